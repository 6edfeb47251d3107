"""What a plan file may hold: the plan, and sections of the config that it is served with."""

PLAN_KEYS = (
    *("model", "slo", "hardware", "pools", "co_located", "predicted", "alternatives", "reason"),
)
CONFIG_KEYS = ("device", "engine", "transfer", "migration", "gateway", "limits", "autoscaling")
