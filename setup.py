"""Builds the native CPU routines where there is a C++ compiler; Tandem also runs without."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
]
# One file an instruction set, chosen at run time: only these may use what the flags allow.
INSTRUCTION_SETS = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": AVX512_BF16,
    "isa_amx.cpp": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
X86 = ("x86_64", "amd64")


class BuildNative(build_ext):
    """Compiles each file with the flags of its instruction set."""

    def build_extension(self, extension: Extension) -> None:
        compile_one = self.compiler.compile
        x86 = any(name in self.plat_name for name in X86)

        def compile_each(sources: list[str], **options: object) -> list[str]:
            objects = []
            for source in sources:
                flags = INSTRUCTION_SETS.get(Path(source).name, []) if x86 else []
                options["extra_postargs"] = [*FLAGS, *flags]
                objects += compile_one([source], **options)
            return objects

        self.compiler.compile = compile_each
        super().build_extension(extension)
        self.compiler.compile = compile_one


native = Path("engine/native")
setup(
    ext_modules=[
        Extension(
            "engine._native",
            sources=[str(path) for path in sorted(native.glob("*.cpp"))],
            depends=[
                str(path) for pattern in ("*.h", "*.inl") for path in sorted(native.glob(pattern))
            ],
            language="c++",
            extra_link_args=["-pthread", "-s"],
            optional=True,
        ),
        Extension(
            "kvtransfer._copy",
            sources=["kvtransfer/native/copy.cpp"],
            language="c++",
            extra_link_args=["-s"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative},
)
