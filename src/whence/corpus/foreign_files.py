"""Files that are no corpus as they are: what each one is, and the command that makes a corpus of it.

A file is known by its ending, or by its first bytes where the ending promises something else.
"""

import re
import shlex

PYTHON = "python -c"


def by_ending(path: str) -> str | None:
    """What a file with an ending that is not read is, and what to do, as the rest of a message; None if unknown."""
    name, ending = shlex.quote(path), path.lower().rpartition("/")[2].partition(".")[2]
    stem = shlex.quote(re.sub(r"\.[A-Za-z0-9]+$", "", path))
    words = {"zip": f"unzip {name} -d {stem}", **dict.fromkeys(("tar", "tgz", "tar.gz", "tar.xz"), f"tar -xf {name}")}
    for kind, command in words.items():
        if ending == kind or ending.endswith(f".{kind}"):
            return f"an archive. Unpack it, and name the directory: {command}"
    last = ending.rpartition(".")[2]
    if last in ("xlsx", "xls", "ods"):
        code = f"import pandas; pandas.read_excel({path!r}).to_csv({path + '.csv'!r}, index=False)"
        return f"a spreadsheet. Save it as csv: {PYTHON} {shlex.quote(code)} (needs pip install openpyxl)"
    if last in ("md", "rst"):
        return f"plain text. Give it the ending of such: cp {name} {shlex.quote(path + '.txt')}"
    if last in ("arrow", "feather"):
        return "an Arrow file. Name the `save_to_disk` directory that holds it, or write it as Parquet."
    if last in ("pkl", "pickle", "pt", "pth", "npy", "npz"):
        return "a file that only Python's pickle could read, and Whence unpickles nothing. Write its rows as jsonl."
    return None


def by_content(head: bytes, path: str) -> str | None:
    r"""What a file is whose first bytes do not fit its ending, and what to do, likewise; None where they fit.

    >>> by_content(b"\x1f\x8b\x08", "a.jsonl")
    'gzip-compressed. Give it that ending: mv a.jsonl a.jsonl.gz'
    """
    name = shlex.quote(path)
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself. Fetch it: git lfs pull"
    if path.lower().endswith(".parquet"):
        return None
    if head.startswith(b"PK\x03\x04"):
        return f"a zip archive or a spreadsheet. Unpack it (unzip {name}), or save the sheet as csv."
    if head.startswith(b"\x1f\x8b"):
        return f"gzip-compressed. Give it that ending: mv {name} {shlex.quote(path + '.gz')}"
    if head.startswith(b"PAR1"):
        return f"a Parquet file. Give it that ending: mv {name} {shlex.quote(path + '.parquet')}"
    encoding = _utf16_or_32(head)
    if encoding:
        return f"in {encoding}, where UTF-8 is expected. Convert it: iconv -f {encoding} -t UTF-8 {name} > NEW"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page or XML, perhaps of a download that failed. Download the data itself."
    return None


def _utf16_or_32(head: bytes) -> str | None:
    """The encoding that the first bytes show: by their mark, or since every second byte of ASCII is 0."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if len(head) > 3 and head[0] and not head[1] and head[2] and not head[3]:
        return "UTF-16LE"
    return "UTF-16BE" if len(head) > 3 and not head[0] and head[1] and not head[2] and head[3] else None
