"""Whatever bytes a caption, a table or a file of prompts holds, its reader gives texts or one line that names the file."""

from __future__ import annotations

import os

import pytest
from helpers.images import write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import ConfigError, build, override, read_toml
from trainer.data.captions import read_captions, read_prompts
from trainer.data.report import Report
from trainer.training.config import TrainConfig

EXAMPLES = [25, pytest.param(500, marks=pytest.mark.full)]
PIECES = st.sampled_from(
    [
        *(
            "a.png",
            "b.png",
            "path",
            "prompt",
            "text",
            "file_name",
            "Steps: 20, Sampler: Euler",
            "Negative prompt:",
            "sep=;",
            "{",
            "}",
            "[",
            "]",
        ),
        *(
            ",",
            ";",
            "\t",
            "|",
            '"',
            '""',
            "'",
            "\\",
            "=",
            "#",
            "\n",
            "\r\n",
            "\r",
            "\0",
            "\x0b",
            "\x1c",
            "\x85",
            "\u2028",
            "\ufeff",
            "\ud83c",
            "★",
        ),
        *(
            '{"path": "a.png", "text": ',
            '"a star"}',
            "NaN",
            "null",
            "true",
            "1e999",
            "9" * 5000,
            "[" * 3000,
            "[x]",
            "out",
            "steps",
            "1979-05-27",
            "../",
        ),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=24).map("".join)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
CONTENTS = st.builds(
    lambda text, encoding: text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass"), TEXTS, ENCODINGS
)
CONTENTS |= st.builds(lambda text: b"path,prompt\n" + text.encode("utf-8", "replace"), TEXTS) | st.binary(max_size=64)


def fuzz(check, examples):
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))(given(CONTENTS)(check))()


def texts_or_one_line(read, path):
    try:
        found = read()
    except ValueError as error:
        assert "\n" not in str(error) and path.name in str(error).replace("a.png has no caption", path.name), str(error)
        return []
    assert all(isinstance(text, str) and text.strip() for text in found)
    for text in found:
        text.encode("utf-8")  # as every tokenizer does
    return found


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["a.txt", "m.csv", "m.tsv", "m.jsonl", "p.txt", "p.csv", "p.jsonl"])
def test_texts_and_tables(name, examples, tmp_path):
    path = tmp_path / name
    write_image(tmp_path / "a.png", 0)
    source = str(tmp_path if name == "a.txt" else path)

    def check(content):
        path.write_bytes(content)
        report = Report()
        if name[0] == "p":
            read = lambda: read_prompts(path, report)  # noqa: E731
        else:
            read = lambda: [caption for _, caption in read_captions(source, report)]  # noqa: E731
        found = texts_or_one_line(read, path)
        assert len(str(report).splitlines()) == 1 and (not found or "read " in str(report))

    fuzz(check, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_toml(examples, tmp_path):
    path = tmp_path / "c.toml"

    def check(content):
        path.write_bytes(b'out = "x"\n' + content if content[:2].isalpha() else content)
        for values, given_ in ((read_toml, []), (lambda _: {}, [f"--out={content.decode('utf-8', 'replace')}"])):
            try:
                build(TrainConfig, override(values(path), given_))
            except ConfigError as error:
                assert len(str(error).split("\n")) == 1, str(error)

    fuzz(check, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_names_of_files(examples, tmp_path):
    names = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & set(b"/\0") and name not in (b".", b".."))

    @settings(max_examples=examples, deadline=None, database=None)
    @given(names)
    def check(name):
        folder = tmp_path / "in"
        write_image(folder / "x.png", 0)
        (folder / "t.txt").write_text("a star")
        image, caption = (os.path.join(os.fsencode(folder), name + suffix) for suffix in (b".png", b".txt"))
        os.replace(folder / "x.png", image)
        os.replace(folder / "t.txt", caption)
        if name.startswith(b"."):
            with pytest.raises(ValueError, match="holds no image"):
                read_captions(str(folder))
        else:
            report = Report()
            ((path, text),) = read_captions(str(folder), report)
            assert os.fsencode(path) == image and text == "a star" and "\n" not in str(report)
        os.unlink(image)
        os.unlink(caption)

    check()
