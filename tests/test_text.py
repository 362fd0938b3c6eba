"""Encodings of text files, and their lines."""

from __future__ import annotations

import codecs

import pytest

from trainer.text import lines, read_text


@pytest.mark.parametrize("text", ["a red star\n", "ein süßer Stern\r\n", "красная звезда\nх\n", "一只红色的星\n", "★", "\u2028 \x85\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_and_utf_8_are_read(text, encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == text
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_read_or_refused(order, tmp_path):
    path, refused = tmp_path / "a.txt", []
    texts = ["a red star\n", "süß\n", "一只红色的星\n", "path;text\na.png;красная звезда\n", "звезда\n", "一\n", "\n", "一只红色的星"]
    for text in texts:
        path.write_bytes(text.encode(order))
        try:
            assert read_text(path) == text
        except ValueError as error:
            refused.append(text)
            assert str(error).startswith(f"{path} is not ") and str(error).endswith("save it as UTF-8")
    assert refused == ["звезда\n", "一\n", "一只红色的星"]  # what nothing tells from other files


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"a star\0", b"a\0star\n" * 50, b"\0", b"\0" * 64, b"caf\xe9", b"\xff\xfea"]
)
def test_what_is_not_text_is_refused_with_the_line(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a.txt is not (a text file: it holds zero bytes|UTF-.* \(line \d+, byte 0x..\)).*save it as UTF-8"
    ):
        read_text(tmp_path / "a.txt")


def test_lines_end_at_line_ends_alone():
    for text in ("a\nb\r\nc\rd\n\ne", "a\n", "a\n\n", "", "\n"):
        assert lines(text) == text.splitlines()
    one = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
    assert lines(one) == [one] and len(one.splitlines()) == 9
