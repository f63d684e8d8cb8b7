"""Documents of files of several kinds, piece by piece."""

import json

import pytest

from fourfold.launch.training import text_files
from fourfold.launch.training.corpus import Sources
from fourfold.launch.training.text_files import documents, found_files


def texts(path, column="text"):
    return [b"".join(document) for document in documents(path, column)]


def test_a_text_file_is_one_document_in_pieces_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_PIECE_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"first line\nsecond\nthird without end")
    (document,) = documents(path, "text")
    pieces = list(document)
    assert b"".join(pieces) == path.read_bytes()
    assert len(pieces) > 1
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in ("one", "zwölf")) + "\n\n")
    assert texts(path) == [b"one", "zwölf".encode()]


@pytest.mark.parametrize(
    ("line", "said"), [("{", "line 2 is no JSON"), ("[" * 99_999, "line 2 is no JSON"), ("3", "line 2 has no text in")]
)
def test_broken_lines_are_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n" + line)
    with pytest.raises(ValueError, match=said):
        texts(path)


def test_parquet_is_read_by_a_library_or_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    path = tmp_path / "a.parquet"
    path.touch()
    with pytest.raises(ValueError, match=r"pip install 'fourfold\[data\]'"):
        texts(path)


def test_parquet_rows_are_documents(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    path = tmp_path / "a[1].parquet"  # a name that as a pattern would mean another file
    parquet.write_table(table({"n": [1, 2], "body": ["one", "zwölf"]}), path)
    assert texts(path, "body") == [b"one", "zwölf".encode()]
    with pytest.raises(ValueError, match=r"row 0 has no text in 'text': give --text-column"):
        texts(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\[1\]\.parquet: not a Parquet file \(") as error:
        texts(path, "body")
    assert "\n" not in str(error.value)


def test_the_mark_of_an_encoding_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(path) == [b"one\r\ntwo"]
    path.write_bytes(b"\xef\xbb\xbf")
    assert texts(path) == [b""]


@pytest.mark.parametrize("content", ["line\n".encode("utf-16"), b"PK\x03\x04\0\0binary"], ids=["utf-16", "binary"])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt: holds zero bytes, so it is no text: give UTF-8, or tokens"):
        texts(path)


def test_half_a_character_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "\\ud800 x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 holds half of a surrogate pair"):
        texts(path)


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in found_files([str(tmp_path)], "data")] == ["a.txt", "b.txt", "c.txt"]
    assert [path.name for path in found_files([str(tmp_path / "*.txt")], "data")] == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match=r"data='.*none': no such file"):
        found_files([str(tmp_path / "none")], "data")


def test_a_run_kept_in_the_tokenizers_folder_does_not_change_what_its_tokens_are_of(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    sources = Sources(train=(text,), held_out=(), tokenizer=tmp_path, text_column="text")
    before = sources.identity()
    (tmp_path / "tokens.partial").mkdir()
    (tmp_path / "summary.json").write_text("{}")
    assert sources.identity() == before
    (tmp_path / "tokenizer.json").write_text('{"other": 1}')
    assert sources.identity() != before
