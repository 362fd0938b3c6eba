"""CSV and JSONL as spreadsheets, scripts and people write them: what they mean, or an error with the line."""

from __future__ import annotations

import csv
import json

import pytest
from helpers.images import write_image

from trainer.data.captions import read_captions, read_prompts
from trainer.data.report import Report


@pytest.fixture
def table(tmp_path):
    """Read a table of two images, a.png and b.png: its captions, or the error after the file's name."""
    for i, name in enumerate(("a.png", "b.png")):
        write_image(tmp_path / name, i)

    def read(content, name="m.csv", report=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            return [caption for _, caption in read_captions(str(path), report)]
        except ValueError as error:
            assert "\n" not in str(error)
            return str(error).replace(f"{path}, ", "").replace(str(path), name)

    return read


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("file_name,text\na.png,a red star, crisp, vivid\n", ["a red star, crisp, vivid"]),
        ("file_name,text\na.png,red,vivid\n", ["red,vivid"]),
        ("text,file_name\na red star, crisp,a.png\n", ["a red star, crisp"]),
        ("file_name,score,text\na.png,1,a star, crisp\n", ["a star, crisp"]),
        ("file_name,text\na.png,a star,,\n", ["a star"]),  # as spreadsheets pad rows
        ("file_name,text,,\na.png,a star,,\n,,,\n", ["a star"]),
        ("file_name;text\na.png;a star, red\n", ["a star, red"]),
        ("file_name\ttext\na.png\ta star, red\n", ["a star, red"]),
        ("image_name| comment_number| comment| caption\na.png| 0| x| a star, red\n", ["a star, red"]),
        ("sep=;\r\nfile_name;text\r\na.png;a star\r\n", ["a star"]),
        ('file_name, text\na.png, "a star, red"\n', ["a star, red"]),
        ("File_Name,Text\na.png,a star\n", ["a star"]),
        ("File Name,Positive-Prompt\na.png,a star\n", ["a star"]),
        (",path,prompt\n0,a.png,a star\n", ["a star"]),  # pandas' index
        ('path,prompt\na.png,"a ""big"" star\nin two lines"\n', ['a "big" star\nin two lines']),
        ("path,prompt\r\na.png,a star\r\n\r\nb.png,a ring\r\n", ["a star", "a ring"]),
        ("path,prompt\ra.png,a star\rb.png,a ring", ["a star", "a ring"]),
        ("path,prompt\na.png,a\u2028star\x0bwith\x1cmany\x85ends\x0c.\nb.png,b\n", ["a\u2028star\x0bwith\x1cmany\x85ends\x0c.", "b"]),
        ("path,prompt\na.png,a star\n".encode("utf-8-sig"), ["a star"]),
        ("path,prompt\na.png,a süß ★\n".encode("utf-16"), ["a süß ★"]),
        ("path,prompt\na.png,a süß ★\n".encode("utf-16-le"), ["a süß ★"]),
        ("path,prompt\na.png,一只猫\n".encode("utf-16-be"), ["一只猫"]),
        ("path,prompt\na.png,a star\n".encode("utf-32"), ["a star"]),
        ("path,prompt\n.\\a.png,a star\n", ["a star"]),
        ('path,prompt\na.png,"a star\nNegative prompt: ugly\nSteps: 20, Sampler: Euler, Seed: 1"\n', ["a star"]),
        ("path,prompt\na.png,{red|blue} star\n", ["{red|blue} star"]),
        ("path,score,score,prompt\na.png,1,2,a star\n", ["a star"]),
    ],
)
def test_tables_are_read_as_their_format_means(content, captions, table):
    assert table(content) == captions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('file_name,text\na.png,"a star\nb.png,a ring\n', "line 2: a quote that is never closed: close it, or double quotes in a text"),
        ('file_name,text\na.png,"a star\nb.png,he said "\n', "line 2: a quote that is open to line 3"),
        ('text,file_name\n"a star,a.png\na ring ",b.png\n', "line 2: a quote that is open to line 3"),
        ('file_name,text\na.png,"a star\nb.png,"a ring"\n', "line 2: ',' expected after '\"': double the quotes in a quoted text"),
        ('file_name,text\na.png,"big" star\n', "line 2: ',' expected after '\"'"),
        ('file_name,text\na.png,ok\nb.png,"a star", crisp\n', "line 3: 3 fields for 2 columns: put texts that hold ',' in double quotes"),
        ("file_name,text,score\na.png,a star, crisp,0.5\n", "line 2: 4 fields for 3 columns"),
        ("file_name,text\na, b.png,a ring\n", "line 2: 3 fields for 2 columns"),
        ("file_name,text,Text\na.png,a,b\n", "line 1: column 'text' is there twice: keep one"),
        ("a.png,a star\n", "line 1: no column path, image"),
        ("file_name,text\n../a\0.png,a star\n", "not a text file"),
        (b"file_name,text\na.png,caf\xe9\n", "m.csv is not UTF-8 (line 2, byte 0xE9): save it as UTF-8"),
        ("file_name,text\na.png,ü\n".encode("utf-16-le")[:-1], "is not UTF-16-LE (line 2, byte 0x0A)"),
    ],
)
def test_tables_that_could_mean_two_things_are_refused_with_the_line(content, message, table):
    assert message in table(content)


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ('{"file_name": "a.png", "text": ["a star", "one star"]}', ["a star"]),
        ('{"File Name": "a.png", "Caption": "a\u2028star"}', ["a\u2028star"]),
        ('{"file_name": "a.png", "text": "a star \\ud83c"}', ["a star \ufffd"]),
        ('{"file_name": "a.png", "text": "a star \\ud83c\\udf1f"}', ["a star \U0001f31f"]),
        ('{"file_name": "a.png", "text": {"en": "a star"}}', "line 1: expected a text or a list of texts, got an object"),
        ('{"file_name": "a.png", "text": [1, 2]}', "line 1: expected a text or a list of texts, got a list of other values"),
        ('{"file_name": "a.png", "text": NaN}', "line 1: expected a text or a list of texts, got nan"),
        ('{"file_name": "a.png", "text": true}', "line 1: expected a text or a list of texts, got true"),
        ('{"file_name": ["a.png"], "text": "x"}', "line 1: expected the path of an image, got a list of other values"),
        ('{"file_name": "a.png", "text": "x", "Text": "y"}', "line 1: column 'text' is there twice: keep one"),
        ('{"file_name": "a.png", "n": ' + "1" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
        ('[{"file_name": "a.png"}]', "line 1: give one JSON object per line"),
        ('{"file_name": "a.png", "text": ""}', "a.png has no caption: write one into a.txt beside it"),
    ],
)
def test_json_lines_hold_texts(line, result, table):
    read = table(line + "\n", "m.jsonl")
    assert read == result if isinstance(result, list) else result in read


def test_the_report_counts_rows_and_says_what_was_taken_in_part(table, tmp_path):
    report = Report()
    assert table("path,prompt\na.png,red, vivid\nb.png,one\n", report=report) == ["red, vivid", "one"]
    assert str(report) == (
        f"read 2 rows, 2 images, 2 captions from {tmp_path / 'm.csv'}; left out: nothing; "
        "1 with delimiters and no quotes, taken as text (line 2)"
    )
    report = Report()
    table('{"path": "a.png", "text": ["one", "two"]}\n' * 3, "m.jsonl", report)
    assert str(report).endswith("3 with several captions, the first taken (line 1, line 2, …)")


def test_rows_may_name_images_from_the_working_folder_or_one_above_the_table(table, tmp_path, monkeypatch):
    """As tables of `score` do, which wrote the paths that it was given."""
    (tmp_path / "out" / "tables").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    for folder in (tmp_path, tmp_path / "else"):
        monkeypatch.chdir(folder)
        report = Report()
        assert table("path,prompt\na.png,a star\n", "out/tables/m.csv", report) == ["a star"]
        assert f"1 found from the folder {tmp_path}, not the table's (a.png)" in str(report)
    write_image(tmp_path / "out" / "tables" / "b.png", 2)
    report = Report()
    assert table("path,prompt\nb.png,a star\n", "out/tables/m.csv", report) == ["a star"] and not report.notes
    assert "c.png, which does not exist (and 1 more)" in table("path,prompt\na.png,x\nc.png,x\nd.png,x\n", "out/tables/m.csv")


def test_prompt_files_are_lines_or_a_column(tmp_path):
    path = tmp_path / "p.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        path.write_bytes("a red star\r\n\r\nein süßer\u2028Ring\x85\r\nlast".encode(encoding))
        assert read_prompts(path) == ["a red star", "ein süßer\u2028Ring", "last"]
    report = Report()
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na red star\tShapes\n\tNone\n")
    assert read_prompts(tmp_path / "p.tsv", report) == ["a red star"]
    assert str(report) == f"read 1 prompt from {tmp_path / 'p.tsv'}; left out: 1 without a prompt (line 3)"
    (tmp_path / "p.csv").write_text("prompt\na red star, crisp, vivid\n")
    assert read_prompts(tmp_path / "p.csv") == ["a red star, crisp, vivid"]
    for name, content, message in (
        ("p.json", b'["a"]', "prompts are read from a text file, one per line, or from the column prompt"),
        ("p.txt", b"a star\nNegative prompt: ugly\n", "prompt 2 is a line of generation settings"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "p.txt is not"),
        ("p.csv", b"title\na\n", "line 1: no column prompt, caption, text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)


def test_what_python_writes_is_what_is_read(table, tmp_path):
    rows = [("a.png", 'a "star",\r\nred; 1\t2|3'), ("b.png", "a ring\r with a return")]
    for delimiter in (",", ";", "\t"):
        with open(tmp_path / "own.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([("path", "prompt"), *rows])
        assert table((tmp_path / "own.csv").read_bytes()) == [prompt for _, prompt in rows]
    lines = "".join(json.dumps({"path": path, "prompt": prompt}) + "\n" for path, prompt in rows)
    assert table(lines, "own.jsonl") == [prompt for _, prompt in rows]
