"""The adapter file: everything that was trained, in one safetensors file that is either whole or refused.

Notable:
- a sha256 over all bytes but its own 64 digits, at a fixed place: a flipped bit in a value, a name, a shape or the
  description is found. It finds damage, not malice: whoever writes a file can hash it, so every other check stays
- `load_adapter` reads with plain reads, never by mmap (where a file cut short is a SIGBUS), and lets neither pickle nor a
  library near the file. What the header says is held against the file's true size before a byte is allocated for it
- `save_adapter` replaces the file in one step (`files.write_parts`): a crash, a full disk or a SIGKILL leaves the old file
  or the new one
- one content has one file: the same tensors and description give the same bytes

docs/adapter_format.md is the format; its reader of some thirty lines is run by the tests. Saving needs POSIX (flock, fsync
of a folder), loading does not. A file stays readable by `safetensors.torch.load_file`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_adapters.files import CHUNK, json_bytes, json_object, json_values, write_parts
from omni_adapters.shapes import BadInput, listing, shape

FORMAT = 1

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

OPENING = b'{"__metadata__":{"sha256":"'  # every header begins so, which fixes the place of the digest
DIGEST = slice(8 + len(OPENING), 8 + len(OPENING) + 64)  # in the file: after the 8 bytes of header length
MAX_BYTES = 4 << 30  # of a file, unless told otherwise
MAX_HEADER = 16 << 20  # bytes; a header of 1,000 tensors has about 0.1 MB
MAX_AXES = 64  # torch iterates over no more

# A name goes into error messages and terminals: no control characters, line separators or halves of surrogate pairs.
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

DAMAGED = "the file is damaged or was not written by save_adapter: copy it again from where it is whole"

StrPath = str | os.PathLike[str]


class Entry(NamedTuple):
    """One tensor as the header describes it; `size` is in bytes. Entries follow each other in the body without a gap."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


def save_adapter(path: StrPath, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write `tensors` and `description` to one safetensors file, in one step: other readers see the old file or the new.

    path:        the file; a symbolic link is followed. Its folder must exist. The mode is 0666 & ~umask.
    tensors:     name → strided tensor of a dtype in `DTYPES`, any shape of up to 64 axes, any device; views, parameters and
                 tensors that share memory are fine: each is written out by itself. A copy of all is held meanwhile.
    description: JSON values: dicts with str keys, lists, str, bool, None, finite floats, integers of 64 bits.

    Raises BadInput before anything is written: no tensors, NaN or infinity, another dtype or layout, a name with control
    characters, a description that is not JSON, a path that is no regular file. An OSError (disk full, no permission) passes
    through; the old file is then as it was, without a temporary file beside it. One exception: when the fsync of the
    *folder* fails, the new file is already in place, whole, but might not outlast a power cut.
    A SIGKILL may leave `.{name}.{8 hex digits}.saving` behind; the next save of the same path removes it.
    """
    where = f"save_adapter({os.fsdecode(path)!r})"
    target = Path(os.path.realpath(path))
    if target.exists():
        _check_regular(where, target.stat(), "name a file, such as adapter.safetensors")
    if not tensors:
        raise BadInput(where, "no tensors", "at least one", "an adapter is what was trained; pass its state")
    for name, tensor in tensors.items():
        _check_name(where, name)
        _check_kind(where, name, tensor)
    written = json_values(where, "a description", description)
    plain = {name: _snapshot(tensors[name]) for name in _body_order(tensors)}
    for name, tensor in plain.items():
        _check_finite(where, name, tensor)
    head = _head(where, plain, written)
    parts = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in plain.values()]
    digest = _hash_of_head(head)
    for part in parts:
        digest.update(part)
    write_parts(target, [_with_digest(head, digest.hexdigest()), *parts])


def load_adapter(path: StrPath, *, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the description of a file that `save_adapter` wrote, bit for bit.

    max_bytes: the largest file to read. Memory use is the size of the file and some 20 MiB, plus what parsing the header
               takes: a few MiB for thousands of tensors, some 400 MiB for the worst that 16 MiB of JSON can hold.

    Raises BadInput for every file that is not exactly an adapter of a known format (damaged, cut short, some other
    safetensors file, a directory), before a tensor is built. OSErrors (no such file, no permission) pass through.
    """
    where = f"load_adapter({os.fsdecode(path)!r})"
    _check_regular(where, os.stat(path), "name the adapter file itself")  # before opening: a FIFO would wait for a writer
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise BadInput(where, f"a file of {size} bytes", f"at most max_bytes = {max_bytes}",
                           "pass a larger max_bytes if you trust the file")
        head = _read_head(where, file, size)
        header = json_object(where, "a header", head[8:], DAMAGED)
        digest, description = _read_metadata(where, header, head)
        entries = _read_entries(where, header, size - len(head))
        found, buffers = _read_body(where, file, head, entries)
    if found != digest:
        raise BadInput(where, f"bytes whose sha256 is {found[:12]}…", f"{digest[:12]}…, as the header says", DAMAGED)
    return {entry.name: _as_tensor(where, entry, buffer) for entry, buffer in zip(entries, buffers)}, description


# What may stand in a file


def _check_regular(where: str, status: os.stat_result, todo: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, socket or pipe"
        raise BadInput(where, kind, "a regular file", todo)


def _check_name(where: str, name: object) -> None:
    if not isinstance(name, str) or not name or name == "__metadata__" or UNWRITABLE.search(name):
        raise BadInput(where, f"a tensor named {name!r:.80}",
                       "a name without control characters, not empty and not __metadata__", "rename the tensor")


def _check_kind(where: str, name: str, tensor: object) -> None:
    came = f"tensor {name!r:.80} "
    if not isinstance(tensor, Tensor):
        raise BadInput(where, f"{came}of type {type(tensor).__name__}", "a torch.Tensor")
    if type(tensor.detach()) is not Tensor or tensor.layout is not torch.strided or tensor.device.type == "meta":
        kind = f"as {type(tensor.detach()).__name__}, {tensor.layout}, on {tensor.device}"
        raise BadInput(where, came + kind, "a plain strided tensor with values",
                       "gather a sharded one first: full_tensor()")
    if tensor.dtype not in CODES:
        raise BadInput(where, f"{came}of {tensor.dtype}", f"one of {listing(list(CODES), 10)}", "cast it")
    if tensor.ndim > MAX_AXES:
        raise BadInput(where, f"{came}with {tensor.ndim} axes", f"at most {MAX_AXES}", "reshape it")


def _check_finite(where: str, name: str, tensor: Tensor) -> None:
    """In chunks: `isfinite` of a whole tensor takes as much memory again."""
    if tensor.is_floating_point() and not all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(CHUNK)):
        raise BadInput(where, f"NaN or infinity in tensor {name!r:.80} {shape(tensor.shape)} of {tensor.dtype}",
                       "finite values", "go back to the checkpoint before training diverged")


# Writing


def _body_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest dtype first, so that each tensor begins at a multiple of its item size, as mmapping readers need; then by
    name."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _snapshot(tensor: Tensor) -> Tensor:
    """A copy with memory of its own: what is checked, hashed and written is one thing, even while training goes on.

    `contiguous()` would not do: it returns a single value of a strided view as it is, with its stride.
    """
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _head(where: str, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> bytes:
    """The header's length and the header, with zeros for its digest."""
    from omni_adapters import __version__  # at call time: the index may import this module

    metadata = {"sha256": 64 * "0", "adapter_format": str(FORMAT), "omni_adapters": __version__,
                "description": json_bytes(description).decode()}
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json_bytes(header, sort_keys=False)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise BadInput(where, f"names and a description that make a header of {len(text)} bytes",
                       f"at most {MAX_HEADER}", "put large data into tensors")
    return len(text).to_bytes(8, "little") + text


def _with_digest(head: bytes, digest: str) -> bytes:
    return head[:DIGEST.start] + digest.encode() + head[DIGEST.stop:]


def _hash_of_head(head: bytes) -> hashlib._Hash:
    """The sha256 begun: all of the head, with zeros where the digest stands."""
    return hashlib.sha256(_with_digest(head, 64 * "0"))


# Reading


def _read_head(where: str, file: BufferedReader, size: int) -> bytes:
    """The first 8 + N bytes. N is held against the file's size first: nothing larger than the file is allocated."""
    start = file.read(8)
    if len(start) < 8:
        raise BadInput(where, f"a file of {size} bytes", "a header's length in 8 bytes, a header and values", DAMAGED)
    length = int.from_bytes(start, "little")
    if not len(OPENING) <= length <= min(size - 8, MAX_HEADER):
        raise BadInput(where, f"a header length of {length} bytes in a file of {size}",
                       f"at least {len(OPENING)}, and no more than the file or {MAX_HEADER}", DAMAGED)
    header = file.read(length)
    if len(header) < length:
        raise _shrunk(where)
    return start + header


def _shrunk(where: str) -> BadInput:
    return BadInput(where, "a file that became shorter while it was read", "one that stays as it is",
                    "let the writer finish: save_adapter never writes in place")


def _read_metadata(where: str, header: dict[str, Any], head: bytes) -> tuple[str, dict[str, Any]]:
    """The digest and the description, of a format this version knows."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or "adapter_format" not in metadata:
        raise BadInput(where, "a file without adapter_format in its metadata", "an adapter, as save_adapter writes it",
                       "load other safetensors files with safetensors.torch.load_file")
    if any(not isinstance(value, str) for value in metadata.values()):
        raise BadInput(where, "metadata that is not all text", "text for each key", DAMAGED)
    _check_format(where, metadata)
    wanted = {"sha256", "adapter_format", "omni_adapters", "description"}
    if set(metadata) != wanted:
        odd = ", ".join(f"{key!r:.40}" for key in sorted(set(metadata) ^ wanted)[:6])
        raise BadInput(where, f"metadata with missing or unknown keys ({odd})", f"exactly {', '.join(sorted(wanted))}", DAMAGED)
    digest = metadata["sha256"]
    if not re.fullmatch("[0-9a-f]{64}", digest) or not head.startswith(OPENING + digest.encode() + b'"', 8):
        raise BadInput(where, f"sha256 {digest!r:.80}", f"64 hexadecimal digits, {DIGEST.start} bytes into the file", DAMAGED)
    return digest, json_object(where, "a description", metadata["description"].encode(), DAMAGED)


def _check_format(where: str, metadata: Mapping[str, str]) -> None:
    text = metadata["adapter_format"]
    number = int(text) if re.fullmatch("[1-9][0-9]{0,8}", text) else 0
    if number > FORMAT:
        raise BadInput(where, f"adapter format {number}, written by omni_adapters {metadata.get('omni_adapters')!r:.40}",
                       f"format {FORMAT}, the newest that this version knows", "upgrade omni-adapters")
    if number < FORMAT:
        raise BadInput(where, f"adapter format {text!r:.40}", f"format {FORMAT}", DAMAGED)


def _read_entries(where: str, header: Mapping[str, Any], body: int) -> list[Entry]:
    """What the header says of each tensor, held against the `body` bytes that follow it: covered exactly, in order."""
    entries: list[Entry] = []
    begin = 0
    for name, value in header.items():
        if name != "__metadata__":
            _check_name(where, name)
            entries.append(_read_entry(where, name, value, begin))
            begin += entries[-1].size
    if not entries:
        raise BadInput(where, "a file without tensors", "at least one", DAMAGED)
    if begin != body:
        raise BadInput(where, f"{body} bytes of values", f"{begin}, as the header says", DAMAGED)
    return entries


def _read_entry(where: str, name: str, value: object, begin: int) -> Entry:
    came = f"tensor {name!r:.80} with "
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise BadInput(where, f"{came}{value!r:.100}", "exactly dtype, shape and data_offsets", DAMAGED)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise BadInput(where, f"{came}dtype {value['dtype']!r:.100}", f"one of {listing(list(DTYPES), 10)}", DAMAGED)
    sizes, offsets = value["shape"], value["data_offsets"]
    if not _is_counts(sizes, MAX_AXES) or math.prod(max(size, 1) for size in sizes) >= 2**63:
        raise BadInput(where, f"{came}shape {sizes!r:.100}", f"up to {MAX_AXES} integers from 0, below 2**63 values", DAMAGED)
    if not _is_counts(offsets, 2) or len(offsets) != 2:
        raise BadInput(where, f"{came}data_offsets {offsets!r:.100}", "two integers from 0", DAMAGED)
    size = math.prod(sizes) * dtype.itemsize
    if offsets != [begin, begin + size]:
        raise BadInput(where, f"{came}data_offsets {offsets}",
                       f"[{begin}, {begin + size}]: {shape(sizes)} of {value['dtype']} right after the tensor before", DAMAGED)
    return Entry(name, dtype, tuple(sizes), size)


def _is_counts(value: object, most: int) -> bool:
    """A list of up to `most` integers from 0; `true` and 1.0 are none, though Python calls them equal to 1."""
    return isinstance(value, list) and len(value) <= most and all(type(item) is int and item >= 0 for item in value)


def _read_body(where: str, file: BufferedReader, head: bytes, entries: Sequence[Entry]) -> tuple[str, list[Tensor]]:
    """The digest of the whole file, and the bytes of each tensor in memory of its own.

    What is hashed is what is returned: reading twice would let the file change in between.
    """
    digest = _hash_of_head(head)
    buffers = []
    for entry in entries:
        buffer = torch.empty(entry.size, dtype=torch.uint8)
        view = buffer.numpy().data
        for start in range(0, entry.size, CHUNK):
            part = view[start:start + CHUNK]
            if file.readinto(part) != len(part):
                raise _shrunk(where)
            digest.update(part)
        buffers.append(buffer)
    return digest.hexdigest(), buffers


def _as_tensor(where: str, entry: Entry, buffer: Tensor) -> Tensor:
    if entry.dtype is torch.bool and entry.size and int(buffer.max()) > 1:
        raise BadInput(where, f"tensor {entry.name!r:.80} of BOOL with a byte of {int(buffer.max())}", "0 or 1", DAMAGED)
    tensor = buffer.view(entry.dtype).view(entry.shape)
    _check_finite(where, entry.name, tensor)
    return tensor
