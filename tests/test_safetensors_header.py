"""The headers that the safetensors library reads are read here, as it reads them, and no others."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuinit import safetensors_file

safetensors = pytest.importorskip(
    "safetensors", reason="safetensors is not installed: it is in the extra test"
)

DATA = bytes(range(1, 33))  # no two alike, so that what is read tells where it was
ONE = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
NONE = '{"dtype":"F32","shape":[0],"data_offsets":[8,8]}'


def one(fields: str = "", dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> str:
    """A header of one tensor of 8 bytes, or what passes for it."""
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{fields}}}}}'


def field(value: str) -> str:
    """The same, with a field that nobody knows."""
    return one(f',"x":{value}')


def named(name: str) -> str:
    return f'{{"{name}":{ONE}}}'


def nested(depth: int, left: str = "[", right: str = "]") -> str:
    return left * depth + right * depth


# What the header is, and how many bytes of data follow.
CORPUS: dict[str, tuple[str | bytes, int]] = {
    "one tensor": (one(), 8),
    "no tensor": ("{}", 0),
    "no tensor, blanks": (" { } ", 0),
    "no tensor, metadata": ('{"__metadata__":{"a":"b"}}', 0),
    "no tensor, but data": ("{}", 1),
    "nothing": ("", 0),
    "blanks only": ("    ", 0),
    # What is not an object, and what comes before and after it.
    "array": (f"[{ONE}]", 8),
    "array of metadata and tensors": (f'[null,{{"a":{ONE}}}]', 8),
    "null": ("null", 0),
    "string": ('"{}"', 0),
    "two objects": ("{}{}", 0),
    "trailing comma": (f'{{"a":{ONE},}}', 8),
    "leading comma": (f'{{,"a":{ONE}}}', 8),
    "no comma": (f'{{"a":{ONE}"b":{NONE}}}', 8),
    "no colon": (f'{{"a"{ONE}}}', 8),
    "no name": (f"{{{ONE}}}", 8),
    "name without quotes": (f"{{a:{ONE}}}", 8),
    "name in single quotes": (f"{{'a':{ONE}}}", 8),
    "name that is a number": (f"{{1:{ONE}}}", 8),
    "not closed": (one()[:-1], 8),
    "closed twice": (one() + "}", 8),
    "comment": (one() + "//", 8),
    "leading blanks": (" \t\r\n" + one(), 8),
    "trailing blanks": (one() + " \t\r\n", 8),
    "blanks everywhere": (re.sub(r"([{}\[\]:,])", " \t\\1\r\n", one()), 8),
    "trailing NUL": (one() + "\0", 8),
    "form feed": (one() + "\f", 8),
    "vertical tab within": (one().replace(",", ",\v"), 8),
    "no-break space": (one() + "\xa0", 8),
    # Encodings.
    "byte order mark": ("\ufeff" + one(), 8),
    "byte order mark at the end": (one() + "\ufeff", 8),
    **{
        encoding: (one().encode(encoding), 8)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig")
    },
    "latin-1": (named("é").encode("latin-1"), 8),
    "UTF-8 that is cut": (named("é").encode().replace(b"\xa9", b""), 8),
    "overlong": (named("/").encode().replace(b"/", b"\xc0\xaf"), 8),
    "surrogate in UTF-8": (named("/").encode().replace(b"/", b"\xed\xa0\x80"), 8),
    "surrogate pair in UTF-8": (named("/").encode().replace(b"/", b"\xed\xa0\x80\xed\xb0\x80"), 8),
    "beyond the last character": (named("/").encode().replace(b"/", b"\xf4\x90\x80\x80"), 8),
    "continuation byte alone": (named("/").encode().replace(b"/", b"\x80"), 8),
    "bad byte in the metadata": (
        f'{{"__metadata__":{{"k":"/"}},"a":{ONE}}}'.encode().replace(b"/", b"\xff"),
        8,
    ),
    "bad byte after the object": (one().encode() + b"\xff", 8),
    "last character": (named("\U0010ffff"), 8),
    "no character": (named("\ufffe\uffff"), 8),
    # Names.
    **{
        f"name {name!r}": (named(name), 8)
        for name in (
            "",
            "é中😀",
            "\x7f\x80\u2028",
            "\x00",
            "\x1f",
            "\n",
            '\\n\\t\\r\\b\\f\\/\\\\\\"',
            "\\u0000",
            "\\u00e9",
            "\\uD83D\\uDE00",
            "\\ud83d\\ude00x",
            "\\ud83d",
            "\\ude00",
            "\\ude00\\ud83d",
            "\\ud83d\\ud83d\\ude00",
            "\\ud83dx",
            "\\ud83d\\n",
            "\\ud83d\\u0041",
            "\\\\ud83d",
            "\\\\\\ud83d",
            "\\u12",
            "\\u12g4",
            "\\u+123",
            "\\u 123",
            "\\u1_23",
            "\\U00000041",
            "\\x41",
            "\\a",
            "\\'",
            "\\",
        )
    },
    # Numbers.
    **{
        f"offset {number}": (one(offsets=f"[{number},8]"), 8)
        for number in (
            "-0",
            "0.0",
            "0e0",
            "00",
            "+0",
            "-1",
            "true",
            "false",
            "null",
            '"0"',
            "[0]",
            "{}",
            ".0",
            "0.",
        )
    },
    **{
        f"field {number:.20} of {len(number)}": (field(number), 8)
        for number in (
            "NaN",
            "-NaN",
            "Infinity",
            "-Infinity",
            "nan",
            "1e999",
            "-1e999",
            "1e-999",
            "0e999",
            "1e308",
            "1E+2",
            "1e",
            "1e+",
            "1.",
            ".5",
            "-",
            "- 1",
            "01",
            "-01",
            "0x10",
            "1_000",
            "\u0661",
            "-0",
            "-0.0",
            "18446744073709551615",
            "18446744073709551616",
            "-9223372036854775808",
            "-9223372036854775809",
            "9" * 308,
            "9" * 309,
            "-" + "9" * 309,
            "1" + "0" * 5000,
            "0." + "0" * 5000 + "1",
            "true",
            "false",
            "null",
            "True",
            "None",
            "undefined",
            '"text"',
            '"\\ud800"',
            '["\\udc00"]',
            "[1,]",
            "[,1]",
            "[1 2]",
            '{"b":1,"b":2}',
            '{"b":}',
            "[NaN]",
        )
    },
    # Shapes and offsets.
    **{
        f"shape {shape:.40} of {dtype} in {size}": (
            one(dtype=f'"{dtype}"', shape=shape, offsets=f"[0,{size}]"),
            size,
        )
        for dtype, shape, size in (
            ("F32", "[]", 4),
            ("F32", "[1,2,1]", 8),
            ("F32", "[3]", 8),
            ("F32", "2", 8),
            ("F32", "null", 8),
            ("F32", '"2"', 8),
            ("F32", '{"0":2}', 8),
            ("F32", "[2.0]", 8),
            ("F32", "[2e0]", 8),
            ("F32", "[-2]", 8),
            ("F32", "[-0]", 0),
            ("F32", "[true]", 4),
            ("F32", "[[2]]", 8),
            ("F32", "[" + "1," * 99 + "2]", 8),
            ("F32", "[0]", 0),
            ("F32", f"[0,{2**64 - 1}]", 0),
            ("F32", f"[0,{2**64}]", 0),
            ("F32", f"[{2**64 - 1},0]", 0),
            ("F32", f"[0,{2**40},{2**40}]", 0),
            ("F32", f"[{2**40},{2**40},0]", 0),
            ("F32", f"[{2**32},{2**32}]", 0),
            ("F32", f"[{2**61}]", 0),
            ("U8", f"[{2**61}]", 0),
            ("F4", f"[{2**62}]", 0),
            ("F32", f"[{2**59}]", 0),
            ("F32", f"[{2**64 + 2}]", 8),
            ("F4", "[]", 1),
            ("F4", "[3]", 2),
            ("F4", "[3]", 1),
            ("F4", "[4]", 2),
            ("F4", "[0]", 0),
            ("F6_E2M3", "[4]", 3),
            ("F6_E2M3", "[5]", 4),
            ("F6_E3M2", "[8]", 6),
            ("BOOL", "[3]", 3),
            ("C64", "[2]", 16),
            ("C64", "[2]", 8),
        )
    },
    **{
        f"offsets {offsets}": (one(offsets=offsets), 8)
        for offsets in (
            "[0,8,8]",
            "[0]",
            "[]",
            "8",
            "null",
            '{"0":0,"1":8}',
            '{"start":0,"end":8}',
            "[0,[8]]",
            "[8,0]",
            "[8,16]",
            "[1,9]",
            "[0,7]",
            "[0,9]",
            f"[0,{2**64 - 1}]",
            f"[0,{2**64}]",
            f"[{2**64 - 8},0]",
            f"[{2**63},{2**63 + 8}]",
        )
    },
    "data that are cut": (one(), 7),
    "data that go on": (one(), 9),
    "data of nothing": (f'{{"a":{NONE.replace("8,8", "0,0")}}}', 0),
    "nothing after the data": (f'{{"b":{NONE},"a":{ONE}}}', 8),
    "nothing before the data": (f'{{"a":{ONE},"b":{NONE.replace("8,8", "0,0")}}}', 8),
    "nothing within the data": (f'{{"a":{ONE},"b":{NONE.replace("8,8", "4,4")}}}', 8),
    "nothing beyond the data": (f'{{"a":{ONE},"b":{NONE.replace("8,8", "9,9")}}}', 8),
    "two in one place": (f'{{"a":{ONE},"b":{ONE}}}', 8),
    "a hole": (f'{{"a":{ONE},"b":{ONE.replace("0,8", "16,24")}}}', 24),
    "overlapping": (f'{{"a":{ONE},"b":{ONE.replace("0,8", "4,12")}}}', 12),
    "last first": (f'{{"b":{ONE.replace("0,8", "8,16")},"a":{ONE}}}', 16),
    "not aligned": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}}',
        9,
    ),
    # Fields.
    "array for a tensor": ('{"a":["F32",[2],[0,8]]}', 8),
    "array for a tensor, too long": ('{"a":["F32",[2],[0,8],1]}', 8),
    "array for a tensor, too short": ('{"a":["F32",[2]]}', 8),
    "array for a tensor, in another order": ('{"a":[[2],"F32",[0,8]]}', 8),
    "null for a tensor": ('{"a":null}', 0),
    "string for a tensor": ('{"a":"F32"}', 0),
    "other order": ('{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', 8),
    "no dtype": ('{"a":{"shape":[2],"data_offsets":[0,8]}}', 8),
    "no shape": ('{"a":{"dtype":"F32","data_offsets":[0,8]}}', 8),
    "no offsets": ('{"a":{"dtype":"F32","shape":[2]}}', 8),
    "other case": (one().replace("dtype", "Dtype"), 8),
    "escaped field": (one().replace("dtype", "\\u0064type"), 8),
    "field twice": (one(',"dtype":"F32"'), 8),
    "field twice, escaped": (one(',"\\u0064type":"F32"'), 8),
    "unknown field twice": (one(',"x":1,"x":2'), 8),
    "unknown field and one twice": (one(',"x":1,"shape":[2]'), 8),
    "unknown field and one missing": ('{"a":{"dtype":"F32","shape":[2],"x":[0,8]}}', 8),
    "unknown field like a tensor": (field(ONE), 8),
    "unknown field empty": (one(',"":{}'), 8),
    "dtype of an object": (one(dtype='{"F32":null}'), 8),
    "dtype of an object, escaped": (one(dtype='{"\\u004632":null}'), 8),
    **{
        f"dtype {dtype}": (one(dtype=dtype), 8)
        for dtype in (
            '{"F32":{}}',
            '{"F32":[]}',
            '{"F32":1}',
            '{"F32":null,"F32":null}',
            '{"F32":null,"F64":null}',
            '{"Q":null}',
            "{}",
            '["F32"]',
            "null",
            "17",
            '"f32"',
            '"F32 "',
            '"float32"',
            '""',
            '"F128"',
            '"BF32"',
            '"__metadata__"',
        )
    },
    # Names that come twice.
    "name twice": (f'{{"a":{ONE},"a":{ONE}}}', 8),
    "name twice, the last fits": (f'{{"a":{NONE},"a":{ONE}}}', 8),
    "name twice, the first fits": (f'{{"a":{ONE},"a":{NONE}}}', 8),
    "name twice, the first has another size": (f'{{"a":{ONE.replace("[2]", "[3]")},"a":{ONE}}}', 8),
    "name twice, the first is no tensor": (f'{{"a":1,"a":{ONE}}}', 8),
    "name twice, the last is no tensor": (f'{{"a":{ONE},"a":1}}', 8),
    "name twice, escaped": (f'{{"a":{ONE},"\\u0061":{NONE.replace("8,8", "0,0")}}}', 0),
    # Metadata.
    **{
        f"metadata {metadata}": (f'{{"__metadata__":{metadata},"a":{ONE}}}', 8)
        for metadata in (
            "null",
            "{}",
            "[]",
            '""',
            "1",
            "false",
            '{"k":"v"}',
            '{"k":"v","k":"w"}',
            '{"k":1,"k":"w"}',
            '{"k":null}',
            '{"k":1}',
            '{"k":{}}',
            '{"":""}',
            '{"k":"\\ud800"}',
            '{"\\ud800":"v"}',
            '[["k","v"]]',
            ONE,
            '{"dtype":"F32","shape":"2","data_offsets":"0"}',
        )
    },
    "metadata twice": (f'{{"__metadata__":{{}},"a":{ONE},"__metadata__":{{}}}}', 8),
    "metadata twice, once null": (f'{{"__metadata__":null,"__metadata__":{{}},"a":{ONE}}}', 8),
    "metadata escaped": (f'{{"\\u005f_metadata__":{{"k":"v"}},"a":{ONE}}}', 8),
    "metadata twice, once escaped": (f'{{"__metadata__":{{}},"\\u005f_metadata__":{{}},"a":{ONE}}}', 8),
    "metadata last": (f'{{"a":{ONE},"__metadata__":{{"k":"v"}}}}', 8),
    "metadata of other case": (f'{{"__METADATA__":{{"k":"v"}},"a":{ONE}}}', 8),
    # Depth.
    **{f"arrays {depth} deep": (field(nested(depth)), 8) for depth in (1, 124, 125, 126, 127, 500, 3000)},
    **{
        f"objects {depth} deep": (field(nested(depth, '{"k":', "}").replace(":}", ":1}")), 8)
        for depth in (1, 124, 125, 126, 127, 500)
    },
    "wide, not deep": (field("[" + "[]," * 200 + "[]]"), 8),
    "deep, open": ("[" * 100_000, 0),
    "deep objects, open": ('{"a":' * 100_000, 0),
}


def test_the_dtypes_are_those_of_the_library():
    text = one(dtype='"Q"').encode()
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(8))
    known = re.findall(r"`(\w+)`", str(error.value).split("expected one of")[1])
    assert set(safetensors_file.BITS) == set(known)
    for dtype, bits in safetensors_file.BITS.items():  # of 8 elements
        text = one(dtype=f'"{dtype}"', shape="[8]", offsets=f"[0,{bits}]").encode()
        safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(bits))


def read_here(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]] | None:
    """Tensors and metadata; None if the file is refused, by an error that says so."""
    refused = ""
    try:
        tensors, metadata = safetensors_file.read_header(path, whole=True)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"{path}: ")
        assert len(refused) < len(str(path)) + 500
        return None
    data = path.read_bytes()
    found = {
        name: (tensor.code, list(tensor.shape), data[tensor.start : tensor.stop])
        for name, tensor in tensors.items()
    }
    return found, metadata


def read_there(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]] | None:
    """The same by the library."""
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(path, "numpy")
        return None
    found = {name: (given["dtype"], given["shape"], bytes(given["data"])) for name, given in tensors}
    with safetensors.safe_open(path, "numpy") as file:
        return found, file.metadata() or {}


def write_file(path: Path, header: str | bytes, size: int) -> Path:
    text = header if isinstance(header, bytes) else header.encode("utf-8")
    path.write_bytes(len(text).to_bytes(8, "little") + text + DATA[:size])
    return path


@pytest.mark.parametrize("what", CORPUS)
def test_the_corpus_is_read_as_the_library_reads_it(tmp_path, what):
    path = write_file(tmp_path / "m.safetensors", *CORPUS[what])
    assert read_here(path) == read_there(path)


def test_the_corpus_has_many_that_are_read_and_many_that_are_not(tmp_path):
    read = [read_there(write_file(tmp_path / "m.safetensors", *case)) is not None for case in CORPUS.values()]
    assert min(read.count(True), read.count(False)) >= 80


@pytest.mark.parametrize(
    "data", [b"", b"\0", bytes(7), bytes(8), b"\1" + bytes(7) + b"{", b"\xff" * 8 + b"{}"]
)
def test_files_that_end_before_their_header_are_refused_as_by_the_library(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(data)
    assert read_here(path) is None


class Maker:
    """Headers at random, most of them nearly right."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def rarely(self, share: float = 0.02) -> bool:
        return self.random.random() < share

    def blank(self) -> str:
        return self.random.choice(("", " ", "\n", "\t\r")) if self.rarely(0.1) else ""

    def text(self, plain: str) -> str:
        """A JSON string, some of its characters escaped, few of these wrongly."""
        parts = [
            self.random.choice((f"\\u{ord(c):04x}", f"\\u{ord(c):04X}")) if self.rarely(0.05) else c
            for c in plain
        ]
        if self.rarely(0.05):
            odd = (
                "\\ud83d\\ude00",
                "\\ud83d",
                "\\udc00",
                "\\n",
                "\\/",
                "\\x",
                "é",
                "\x01",
                "\\\\",
                '\\"',
                "\ufeff",
            )
            parts.insert(self.random.randrange(len(parts) + 1), self.random.choice(odd))
        return '"' + "".join(parts) + '"'

    def number(self, value: int) -> str:
        if self.rarely():
            odd = (
                f"{value}.0",
                f"{value}e0",
                f"-{value}",
                f"0{value}",
                f"{value + 2**64}",
                "null",
                "true",
                "NaN",
            )
            return self.random.choice(odd)
        return str(value)

    def list(self, items: list[str]) -> str:
        if self.rarely(0.005) and items:
            items = items[:-1]
        comma = "," + self.blank()
        return "[" + self.blank() + comma.join(items) + self.blank() + "]"

    def object(self, pairs: list[tuple[str, str]]) -> str:
        if pairs and self.rarely():
            pairs = [*pairs, self.random.choice(pairs)]
        if self.rarely(0.2):
            self.random.shuffle(pairs)
        members = (self.text(key) + self.blank() + ":" + self.blank() + value for key, value in pairs)
        return "{" + self.blank() + (self.blank() + "," + self.blank()).join(members) + self.blank() + "}"

    def anything(self, depth: int = 0) -> str:
        kind = self.random.randrange(8 if depth < 4 else 6)
        if kind == 6:
            return self.list([self.anything(depth + 1) for _ in range(self.random.randrange(3))])
        if kind == 7:
            keys = ("dtype", "shape", "k", "", "data_offsets")
            pairs = [
                (self.random.choice(keys), self.anything(depth + 1)) for _ in range(self.random.randrange(4))
            ]
            return self.object(pairs)
        odd = ("1e999", "9" * 400, "-1", "1.5e3", "-Infinity", nested(130), nested(124))
        return (
            self.number(3),
            self.text("text"),
            "null",
            "false",
            self.number(2**64 - 1),
            self.random.choice(odd),
        )[kind]

    def header(self) -> tuple[bytes, int]:
        stop, pairs = 0, []
        for number in range(self.random.randrange(4)):
            dtype = self.random.choice(tuple(safetensors_file.BITS))
            shape = [self.random.choice((0, 1, 1, 2, 4)) for _ in range(self.random.randrange(4))]
            bits = math.prod(shape) * safetensors_file.BITS[dtype]
            start, stop = stop, stop + bits // 8
            if self.rarely():
                stop += self.random.choice((-1, 1, 8))
            code = self.text(dtype) if not self.rarely(0.05) else self.object([(dtype, "null")])
            dims = self.list([self.number(length) for length in shape])
            places = self.list([self.number(start), self.number(stop)])
            if self.rarely(0.05):
                value = self.list([code, dims, places])
            else:
                fields = [("dtype", code), ("shape", dims), ("data_offsets", places)]
                fields += [("x", self.anything())] if self.rarely(0.1) else []
                value = self.object(fields)
            pairs.append((f"t{number}", value if not self.rarely() else self.anything()))
        if self.rarely(0.5):
            texts = [("k", self.text("v")), ("gpuinit.seed", self.text("0"))]
            metadata = (
                self.object(texts) if not self.rarely(0.1) else self.random.choice(("null", self.anything()))
            )
            pairs.insert(self.random.randrange(len(pairs) + 1), ("__metadata__", metadata))
        text = (self.blank() + self.object(pairs) + self.blank()).encode("utf-8")
        if self.rarely(0.1):
            at, way = self.random.randrange(len(text)), self.random.randrange(3)
            put = bytes([self.random.choice((*b'{}[],:"\\-.0eEuN \n', 0, 0x7F, 0x80, 0xC3, 0xED, 0xFF))])
            text = text[:at] + (b"" if way == 0 else put) + text[at + (way < 2) :]
        if self.rarely():
            text = text.decode("utf-8", "replace").encode(
                self.random.choice(("utf-16", "utf-32-le", "utf-8-sig"))
            )
        return text, min(stop, len(DATA)) if not self.rarely() else 3

    def headers(self, count: int) -> Iterator[tuple[bytes, int]]:
        return (self.header() for _ in range(count))


def test_headers_at_random_are_read_as_the_library_reads_them(tmp_path):
    path, read = tmp_path / "m.safetensors", []
    for header, size in Maker(17).headers(4000):
        write_file(path, header, size)
        there = read_there(path)
        assert read_here(path) == there, header
        read.append(there is not None)
    assert min(read.count(True), read.count(False)) >= 1000


def test_nothing_is_read_of_what_a_header_leaves_aside(tmp_path):
    """The fields of no use are checked, and left."""
    path = write_file(tmp_path / "m.safetensors", field(json.dumps(list(range(100)))), 8)
    tensors, _ = safetensors_file.read_header(path, whole=True)
    assert tensors["a"] == (path, "F32", (2,), path.stat().st_size - 8, path.stat().st_size)
