"""Keep one architecture's machine code in TransformerEngine's CUDA wheel.

    python benchmarks/device/shrink_wheel.py IN.whl OUT.whl [--architecture 90]

The wheel's shared library carries compiled kernels for eight architectures. Those of the others are overwritten with
zeros in place, which compress to nothing: 277 MB become 32 MB. Offsets stay as they are, so the loader finds the
architecture that is left where it was. JAX's part and the headers of NCCL's expert parallelism are left out.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "libtransformer_engine.so"
LEFT_OUT = ("transformer_engine/jax", "nccl_ep/include")

# CUDA's fat binary, as cuobjdump reads it: a header of magic number, version, its own size and the size of the entries;
# each entry begins with kind, version, the size of its header, the size of its code and, at byte 28, the architecture.
FAT_BINARY = struct.Struct("<IHHQ")
FAT_BINARY_MAGIC = struct.pack("<I", 0xBA55ED50)
ENTRY = struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<I")
ARCHITECTURE_OFFSET = 28


def find_kernels(library: bytes) -> Iterator[tuple[int, slice]]:
    """Yield the architecture and the place of every piece of machine code in a shared library."""
    position = 0
    while (position := library.find(FAT_BINARY_MAGIC, position)) >= 0:
        _, version, header_size, size = FAT_BINARY.unpack_from(library, position)
        if (version, header_size) != (1, FAT_BINARY.size):
            # The magic number by chance, in other data.
            position += len(FAT_BINARY_MAGIC)
            continue

        entry = position + header_size
        position = entry + size
        while entry < position:
            _, _, entry_header_size, code_size = ENTRY.unpack_from(library, entry)
            if not entry_header_size:
                break
            (architecture,) = ARCHITECTURE.unpack_from(library, entry + ARCHITECTURE_OFFSET)
            code = entry + entry_header_size
            yield architecture, slice(code, code + code_size)
            entry = code + code_size


def keep_architecture(library: bytes, architecture: int) -> bytes:
    """Return the library with the machine code of other architectures zeroed."""
    kept = bytearray(library)
    for found, code in find_kernels(library):
        if found != architecture:
            kept[code] = bytes(code.stop - code.start)
    return bytes(kept)


def shrink(source: Path, target: Path, architecture: int) -> None:
    """Write the smaller wheel, with the RECORD that belongs to its files."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        record_name = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        record = []
        for name in old.namelist():
            if name == record_name or any(part in name for part in LEFT_OUT):
                continue
            content = old.read(name)
            if name.endswith(LIBRARY):
                content = keep_architecture(content, architecture)
            new.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{name},sha256={digest.decode()},{len(content)}")
        new.writestr(record_name, "\n".join([*record, f"{record_name},,", ""]))


def main() -> None:
    """Shrink the wheel that the command line names and print the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--architecture", type=int, default=90, help="90 is Hopper (H100, H200)")
    arguments = parser.parse_args()
    shrink(arguments.source, arguments.target, arguments.architecture)
    before, after = (path.stat().st_size / 1e6 for path in (arguments.source, arguments.target))
    print(f"{arguments.target.name}: {before:.0f} MB -> {after:.0f} MB")


if __name__ == "__main__":
    main()
