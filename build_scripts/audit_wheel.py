"""Audit a wheel with its libraries: what they need of a system, where they look for each other, and their GPU images.

python build_scripts/audit_wheel.py WHEEL: exit code 0 if it keeps all of its promises, else 2 and a line for each that
it does not.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from saw_trtllm.plugins.kernels import images_of

KERNELS = "libsaw_kernels.so"
#: What every Linux with glibc and a C++ compiler's runtime has.
SYSTEM = {"ld-linux-x86-64.so.2", "libc.so.6", "libgcc_s.so.1", "libm.so.6", "libstdc++.so.6"}
#: The newest versions of their symbols that may be needed: Ubuntu 22.04 and Red Hat 9 with its toolset have them.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}
MAX_BYTES = 40 << 20


def audit(wheel: Path) -> list[str]:
    """The promises that a wheel does not keep, and on stdout what it holds."""
    broken = []
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB")
    if size >= MAX_BYTES:
        broken.append(f"{wheel.name} has {size:,} bytes: it must have less than {MAX_BYTES:,}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [Path(archive.extract(name, folder)) for name in archive.namelist() if name.endswith(".so")]
        by_name = {path.name: path for path in libraries}
        for name in (KERNELS, "libsaw_trtllm_preload.so"):
            if name not in by_name:
                broken.append(f"{name} is not in the wheel")
        if len([name for name in by_name if name.startswith("_C.")]) != 1:
            broken.append("the wheel must have one module _C")
        for path in libraries:
            broken += _check_library(path)
        if KERNELS in by_name:
            broken += _check_images(by_name[KERNELS])
    return broken


def _check_library(path: Path) -> list[str]:
    broken = []
    with path.open("rb") as file:
        elf = ELFFile(file)
        dynamic = next(s for s in elf.iter_sections() if isinstance(s, DynamicSection))
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        paths = [tag.runpath for tag in dynamic.iter_tags("DT_RUNPATH")]
        paths += [tag.rpath for tag in dynamic.iter_tags("DT_RPATH")]
        versions = {
            version.name
            for section in elf.iter_sections()
            if isinstance(section, GNUVerNeedSection)
            for _, auxiliaries in section.iter_versions()
            for version in auxiliaries
        }
        has_images = elf.get_section_by_name(".nv_fatbin") is not None
    print(f"  {path.name}: {path.stat().st_size / 1e6:.2f} MB, needs {', '.join(sorted(needed))}")
    if strange := needed - SYSTEM - {KERNELS}:
        broken.append(f"{path.name} needs {', '.join(sorted(strange))}, which no system need have")
    if KERNELS in needed and paths != ["$ORIGIN"]:
        broken.append(f"{path.name} looks for {KERNELS} in {paths}: its RUNPATH must be $ORIGIN")
    if has_images != (path.name == KERNELS):
        broken.append(f"{path.name} must have {'' if path.name == KERNELS else 'no '}GPU images")
    for name in sorted(versions):
        library, _, text = name.partition("_")
        numbers = tuple(map(int, re.findall(r"\d+", text)))
        if library in NEWEST and numbers > NEWEST[library]:
            newest = ".".join(map(str, NEWEST[library]))
            broken.append(f"{path.name} needs {name}: it may need {library}_{newest} at most")
    return broken


def _check_images(path: Path) -> list[str]:
    """Require the images that the library says it was compiled with."""
    library = ctypes.CDLL(str(path))
    library.saw_kernels_architectures.restype = ctypes.c_char_p
    promised = images_of(library.saw_kernels_architectures().decode())
    found: set[str] = set()
    for option, kind in (("--list-elf", "sm"), ("--list-ptx", "compute")):
        command = [_cuobjdump(), option, str(path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found |= {f"{kind}_{number}" for number in re.findall(r"\.sm_(\d+a?)\.", listed)}
    print(f"  images: {', '.join(sorted(found))}")
    if sorted(found) != promised:
        return [f"{path.name} has images for {', '.join(sorted(found))}: it promises {', '.join(promised)}"]
    return []


def _cuobjdump() -> str:
    packages = Path(sysconfig.get_path("platlib"))
    return str(next(packages.glob("nvidia/cu*/bin/cuobjdump"), "cuobjdump"))


def main() -> int:
    """Audit the wheel that the command line names."""
    broken = audit(Path(sys.argv[1]))
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 2 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
