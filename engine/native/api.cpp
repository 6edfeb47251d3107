// The C interface that engine/kernels.py calls; the process has one set of kernels in use.
#include "kernels.h"

using namespace tandem;

namespace {

const Kernels *in_use = &scalar_kernels;

template <class Args>
const Args &record_of(const void *record) {
    return *static_cast<const Args *>(record);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t tandem_interface() { return kInterface; }

// The name of instruction set `index`, best first; null past the end.
const char *tandem_set_name(int64_t index) {
    return index < kInstructionSets ? instruction_sets[index].name : nullptr;
}
int64_t tandem_set_usable(int64_t index) { return instruction_sets[index].usable(); }
void tandem_use_set(int64_t index) { in_use = instruction_sets[index].kernels; }
void tandem_set_threads(int64_t threads) { set_threads(threads); }

uint64_t tandem_read_memory(const void *data, int64_t bytes) { return read_memory(data, bytes); }
void tandem_collapse_pages(void *data, int64_t bytes) { collapse_pages(data, bytes); }
void tandem_use_huge_pages(void *data, int64_t bytes) { use_huge_pages(data, bytes); }

void tandem_pack(const void *record) { pack(record_of<PackArgs>(record)); }
bool tandem_unpack(const void *record) { return unpack(record_of<UnpackArgs>(record)); }
void tandem_linear(const void *record) {
    const LinearArgs &args = record_of<LinearArgs>(record);
    if (args.rows > 0) in_use->linear(args);
}
void tandem_norm(const void *record) { in_use->norm(record_of<NormArgs>(record)); }
void tandem_activation(const void *record) { in_use->activation(record_of<ActivationArgs>(record)); }
void tandem_place(const void *record) { in_use->place(record_of<PlaceArgs>(record)); }
void tandem_attention(const void *record) { in_use->attention(record_of<AttentionArgs>(record)); }
void tandem_highest(const void *record) { in_use->highest(record_of<HighestArgs>(record)); }

// Calls kernels one after the other: each call is a CallHeader and the kernel's record.
void tandem_replay(const void *calls, int64_t bytes) {
    constexpr void (*kernels[])(const void *) = {tandem_linear, tandem_norm, tandem_activation, tandem_place, tandem_attention};
    auto call = static_cast<const char *>(calls), end = call + bytes;
    while (call != end) {
        const CallHeader &header = record_of<CallHeader>(call);
        kernels[header.kernel](call + sizeof header);
        call += sizeof header + header.record_bytes;
    }
}
}
#pragma GCC visibility pop
