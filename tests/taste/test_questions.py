"""Questions that wait for a choice: how images become questions, what a reload, two tabs, undo and a kill leave."""

from __future__ import annotations

import errno
import json
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from trainer.data.choices import parse_choices
from trainer.taste import questions as module
from trainer.taste.choices import append, choice, read_choices, save_image
from trainer.taste.questions import Questions, Stale


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "user" / "own"


def images(folder, number, first=0):
    return [save_image(folder, Image.new("RGB", (6, 5), (i % 256, i // 256, 9)), seed=i) for i in range(first, first + number)]


def asked(one):
    """Seeds of each open question's images."""
    return [[image.seed for image in question.images] for question in one.open()]


def test_images_of_one_prompt_become_pairs_and_the_last_waits_for_the_next_run(folder):
    one = Questions(folder)
    assert one.add(images(folder, 3), "pair", "p") == module.Added(1, 0, 0)
    assert one.add(images(folder, 1, 10), "pair", "another").questions == 0
    assert one.add(images(folder, 2, 3), "pair", "p") == module.Added(1, 0, 0)
    assert one.add(images(folder, 1, 5), "pair", "p") == module.Added(1, 0, 0)
    assert asked(one) == [[0, 1], [3, 4], [2, 5]] and one.state()["waiting"] == 1
    assert {question.prompt for question in one.open()} == {"p"}


def test_images_that_were_shown_are_asked_about_in_other_pairs(folder):
    """As for pairs that an earlier choice made worth asking about."""
    one, four = Questions(folder), images(folder, 5)
    one.add(four[:3], "pair", "p")
    assert one.add([four[1], four[2], four[0], four[3]], "pair", "p") == module.Added(2, 0, 0)
    assert asked(one) == [[0, 1], [1, 2], [0, 3]] and one.state()["waiting"] == 0  # 2 has a partner now
    assert one.add([four[3], four[0], four[4], four[1], four[2]], "pair", "p") == module.Added(1, 3, 0)
    assert asked(one)[3:] == [[4, 1]]


def test_the_best_of_n_and_thumbs(folder):
    one = Questions(folder)
    one.add(images(folder, 9), "best", "p", 4)
    one.add(images(folder, 2), "thumb", "p")
    assert asked(one) == [[0, 1, 2, 3], [4, 5, 6, 7], [0], [1]] and one.state()["waiting"] == 1


def test_an_image_is_asked_about_once_for_each_prompt_person_and_kind(folder):
    one, three = Questions(folder), images(folder, 2)
    assert one.add([*three, three[0]], "pair", "p") == module.Added(1, 1, 0)
    assert one.add(three, "pair", "p") == module.Added(0, 2, 0)
    one.answer(one.open()[0].id, "chosen", 1)
    assert one.add(three, "pair", "p") == module.Added(0, 2, 0)
    for kind, prompt, person in (("pair", "q", ""), ("pair", "p", "ann"), ("thumb", "p", "")):
        assert one.add(three, kind, prompt, person=person).questions == {"pair": 1, "thumb": 2}[kind]


def test_prompts_of_any_characters_are_known_again_and_endless_ones_refused(folder):
    one, two = Questions(folder), images(folder, 2)
    for prompt in ("\ud800 half a pair", "line\nend \u2028 \0", '{"json"}', "x" * (1 << 20)):
        assert [one.add(two, "pair", prompt).questions for _ in range(2)] == [1, 0]
    with pytest.raises(ValueError, match="at most 1048576 characters"):
        one.add(two, "pair", "x" * (1 << 20) + "x")
    assert one.state()["open"] == 4


def test_a_choice_is_written_as_it_was_shown(folder):
    one = Questions(folder)
    one.add(images(folder, 4), "best", "a cat", 4, "ann")
    shown = one.state()["question"]
    assert sorted(image["index"] for image in shown["images"]) == [0, 1, 2, 3]
    one.answer(shown["id"], "chosen", shown["images"][0]["index"])
    (record,) = read_choices(one.path).records
    assert record.order == tuple(image["index"] for image in shown["images"]) and record.chosen == record.order[0]
    assert (record.id, record.kind, record.prompt, record.person) == (shown["id"], "best", "a cat", "ann")
    assert [image.seed for image in record.images] == [0, 1, 2, 3] and record.images[0].file.is_file()


def test_sides_are_drawn_and_stay_as_they_were_drawn(folder, monkeypatch):
    one = Questions(folder)
    one.add(images(folder, 80), "pair", "p")
    orders = [question.order for question in one.open()]
    assert set(orders) == {(0, 1), (1, 0)}  # 40 fair draws are equal once in 5·10¹¹
    assert [question.order for question in Questions(folder).open()] == orders


def test_two_tabs_answer_one_question_once(folder):
    first, second = Questions(folder), Questions(folder)
    first.add(images(folder, 4), "pair", "p")
    number = second.state()["question"]["id"]
    first.answer(number, "chosen", 0)
    with pytest.raises(Stale):
        second.answer(number, "chosen", 1)
    assert len(read_choices(first.path).records) == 1 and second.state()["question"]["id"] != number
    assert first.state() == second.state()


def test_undo_asks_again_under_a_new_id_and_only_of_the_last(folder):
    one = Questions(folder)
    one.add(images(folder, 4), "pair", "p")
    before = one.state()["question"]
    for outcome, chosen in (("chosen", 0), ("tie", None)):
        one.answer(one.state()["question"]["id"], outcome, chosen)
    first, last = read_choices(one.path).records
    with pytest.raises(Stale):
        one.undo(first.id)
    one.undo(last.id)
    with pytest.raises(Stale):
        one.undo(last.id)
    one.undo(first.id)
    again = one.state()["question"]
    assert again["id"] != before["id"] and again["images"] == before["images"] and one.state()["open"] == 2
    one.answer(again["id"], "skip", None)
    assert [record.outcome for record in read_choices(one.path).records] == ["skip"] and one.state()["counts"] == {"skip": 1}


def test_a_kill_between_two_files_neither_asks_again_nor_counts_twice(folder):
    one = Questions(folder)
    one.add(images(folder, 3), "pair", "p")
    question, waiting = one.open()[0], (folder / "waiting.jsonl").read_bytes()
    append(one.path, choice("pair", "p", question.images, "chosen", 0, number=question.id))  # killed before open.jsonl
    assert one.open() == [] and one.state()["question"] is None
    one.add(images(folder, 1, 7), "pair", "p")
    (folder / "waiting.jsonl").write_bytes(waiting)  # killed before waiting.jsonl
    assert one.state()["waiting"] == 0 and asked(one) == [[2, 7]]


def test_an_undo_that_is_killed_before_the_questions_are_written_asks_again_all_the_same(folder, monkeypatch):
    one = Questions(folder)
    one.add(images(folder, 6), "pair", "p")
    for _ in range(2):
        one.answer(one.open()[0].id, "chosen", 0)
    monkeypatch.setattr(Questions, "_write", no_space)
    for _ in range(2):
        one.undo(one.choices().records[-1].id)
    numbers = [question.id for question in one.open()]
    assert asked(one) == [[0, 1], [2, 3], [4, 5]] and asked(Questions(folder)) == asked(one)
    monkeypatch.undo()
    for number in numbers[:2]:
        one.answer(number, "skip", None)
    assert asked(one) == [[4, 5]] and one.state()["counts"] == {"skip": 2}


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_a_choice_whole_or_not_made(folder, monkeypatch):
    resource = pytest.importorskip("resource")
    one = Questions(folder)
    one.add(images(folder, 6), "pair", "p")
    one.answer(one.open()[0].id, "chosen", 0)
    first, number = one.path.read_bytes(), one.open()[0].id
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) + 50, limits[1]))  # 50 bytes of the line are written
    try:
        with pytest.raises(OSError, match="disk is full"):
            one.answer(number, "chosen", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one.path.read_bytes() == first and asked(one) == [[2, 3], [4, 5]]
    monkeypatch.setattr(Questions, "_write", no_space)  # the choice found place, and the shorter list of questions does not
    one.answer(number, "chosen", 1)
    assert asked(one) == [[4, 5]] and one.state()["counts"] == {"chosen": 2} and one.state()["left_out"] == 0


def test_another_process_that_writes_is_waited_for(folder, monkeypatch):
    one = Questions(folder)
    one.add(images(folder, 4), "pair", "p")
    number = one.open()[0].id
    monkeypatch.setattr(module, "_PATIENCE", 0.02)
    with FileLock(folder.parent / ".lock"):
        for call in (lambda: one.answer(number, "skip", None), one.delete, lambda: one.add(images(folder, 2, 9), "pair", "p")):
            with pytest.raises(OSError, match="another program"):
                call()
        assert one.state()["open"] == 2  # who only reads does not wait
    one.answer(number, "skip", None)
    assert one.state()["counts"] == {"skip": 1}


def test_a_file_that_grows_is_read_as_from_its_beginning(folder):
    one = Questions(folder)
    one.add(images(folder, 12), "pair", "p")
    for i in range(5):
        one.answer(one.open()[0].id, "chosen", i % 2)
        assert one.choices() == parse_choices(one.path.read_bytes(), one.path)
    one.undo(one.choices().records[-1].id)
    with open(one.path, "ab") as file:
        file.write(b'{"cut')
    assert one.choices() == parse_choices(one.path.read_bytes(), one.path) and one.state()["left_out"] == 1
    one.answer(one.open()[0].id, "tie", None)
    assert one.choices() == parse_choices(one.path.read_bytes(), one.path) and one.choices().cut[0][0] == 7
    data = one.path.read_bytes().splitlines(keepends=True)
    for edited in (data[1:], data[1:] + data[:1] + data, data[:3]):  # by hand: shorter, longer, and a beginning of what it was
        one.path.write_bytes(b"".join(edited))
        assert one.choices() == parse_choices(one.path.read_bytes(), one.path)


def test_images_that_are_gone_are_neither_asked_about_nor_chosen(folder):
    one, four = Questions(folder), images(folder, 4)
    one.add(four[:2], "pair", "p")
    for image in four[1:3]:  # deleted between saving and asking, or by hand
        image.file.unlink()
    assert one.add(four[2:], "pair", "p").questions == 0 and one.state()["waiting"] == 1
    number = one.open()[0].id
    with pytest.raises(ValueError, match="gone from the disk: skip it"):
        one.answer(number, "chosen", 0)
    one.answer(number, "skip", None)


def test_a_deletion_removes_what_kills_left_and_can_be_repeated(folder, monkeypatch):
    one = Questions(folder)
    one.add(images(folder, 4), "pair", "p")
    one.answer(one.open()[0].id, "chosen", 0)
    for place in (folder, folder / "images"):
        (place / ".x9.partial").write_bytes(b"half an image")
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **more: no_space() if path.name == "open.jsonl" else unlink(path, **more))
    with pytest.raises(OSError):
        one.delete()
    assert one.state()["last"] is not None  # so that the button to delete is there
    monkeypatch.undo()
    one.delete()
    assert not folder.exists()


def test_damaged_files_of_state_lose_no_choice(folder):
    one = Questions(folder)
    one.add(images(folder, 5), "pair", "p")
    one.answer(one.open()[0].id, "chosen", 0)
    for name in ("open.jsonl", "waiting.jsonl"):
        (folder / name).write_bytes(b"\0{{")
    with open(one.path, "ab") as file:
        file.write(b'{"version"')
    state = one.state()
    assert state["open"] == 0 and state["counts"] == {"chosen": 1} and state["left_out"] == 1


def test_no_more_questions_than_the_limit(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    one = Questions(folder)
    assert one.add(images(folder, 9), "pair", "p") == module.Added(2, 0, 4)
    assert one.state()["open"] == 2 and one.state()["waiting"] == 1


def test_wrong_answers_write_nothing(folder):
    one = Questions(folder)
    one.add(images(folder, 2), "pair", "p")
    number = one.open()[0].id
    for outcome, chosen in (("chosen", 2), ("chosen", -1), ("chosen", None), ("tie", 0), ("liked", None)):
        with pytest.raises(ValueError):
            one.answer(number, outcome, chosen)
    assert not one.path.exists() and one.state()["open"] == 1


def test_export_holds_what_the_reader_reads_and_delete_leaves_other_files(folder, tmp_path):
    one = Questions(folder)
    one.add(images(folder, 4), "pair", "p")
    one.answer(one.open()[0].id, "chosen", 1)
    one.export(tmp_path / "taste.zip")
    with zipfile.ZipFile(tmp_path / "taste.zip") as archive:
        archive.extractall(tmp_path / "there")
    there, here = read_choices(tmp_path / "there" / "choices.jsonl").pairs(), read_choices(one.path).pairs()
    assert [(p.chosen.read_bytes(), p.prompt) for p in there] == [(p.chosen.read_bytes(), p.prompt) for p in here] and len(here) == 1
    assert len([*(tmp_path / "there" / "images").iterdir()]) == 2
    (folder / "head.safetensors").write_bytes(b"mine")
    (folder / "images" / "my.png").write_bytes(b"mine")
    one.delete()
    assert sorted(path.name for path in folder.rglob("*")) == ["head.safetensors", "images", "my.png"]
    assert one.state()["open"] == 0


@pytest.mark.parametrize("name", ["choices.jsonl", "open.jsonl", "images", ""])
def test_links_are_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "choices.jsonl").write_text(json.dumps({"secret": 1}))
    (folder if name else folder.parent).mkdir(parents=True)
    (folder / name).symlink_to(outside / "choices.jsonl" if name.endswith("l") else outside)
    with pytest.raises(ValueError, match="is a link"):
        Questions(folder)


def test_an_image_that_is_a_link_is_neither_read_nor_deleted_nor_written_through(folder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    one = Questions(folder)
    (first,) = images(folder, 1)
    first.file.unlink()
    first.file.symlink_to(secret)
    with pytest.raises(ValueError, match="is a link"):
        one.image(first.sha256)
    (again,) = images(folder, 1)
    assert not again.file.is_symlink() and one.image(again.sha256)[1:4] == b"PNG"
    again.file.unlink()
    again.file.symlink_to(secret)
    one.delete()
    assert secret.read_bytes() == b"secret"


@pytest.mark.parametrize("sha256", ["", "../choices", "0" * 63, "0" * 64 + "\n", "A" * 64, "/" + "0" * 63, "0" * 64 + ".png"])
def test_other_names_of_images_are_refused(folder, sha256):
    with pytest.raises(ValueError):
        Questions(folder).image(sha256)
