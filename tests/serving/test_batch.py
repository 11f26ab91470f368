"""`convllava batch`: every row is answered once, bad ones are named, killed runs go on."""

import json

import pytest

from convllava_hf.inference.answer import answer


@pytest.fixture(scope="module")
def answerer(server):
    """On the engine of the server, so that nothing is loaded twice."""
    from convllava_hf.serving.batch import BatchAnswerer

    answerer = BatchAnswerer("unused", max_new_tokens=8)
    answerer._engine = server.backend.engine
    return answerer


@pytest.fixture
def folder(tmp_path, pictures):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / ("deeper" if number % 2 else "") / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image")
    return folder


def read(output) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_a_folder_is_answered_as_the_model_answers(answerer, server, folder, pictures, tmp_path):
    from convllava_hf.serving.batch import answer_rows, list_rows

    output = tmp_path / "answers.jsonl"
    assert answer_rows(answerer, list_rows(str(folder), "What is this?"), output, 3) == (5, 1)
    found = {line["id"]: line for line in read(output)}
    assert set(found) == {"0.png", "deeper/1.png", "2.png", "deeper/3.png", "broken.png"}
    expected = answer(server.model, server.processor, "What is this?", [pictures[1]], max_new_tokens=8)
    assert found["deeper/1.png"] == {
        "id": "deeper/1.png",
        "question": "What is this?",
        "answer": expected,
        "error": None,
    }
    assert "broken.png" in found["broken.png"]["error"] and found["broken.png"]["answer"] is None


def test_a_killed_run_goes_on(answerer, folder, tmp_path):
    """The first run dies in its second batch, in the middle of a line."""
    from convllava_hf.serving.batch import answer_rows, list_rows

    output = tmp_path / "answers.jsonl"
    rows = list(list_rows(str(folder), "What?"))

    def die(batch):
        if any(row["id"] == batch["id"][0] for row in rows[2:]):
            raise KeyboardInterrupt
        return answerer(batch)

    with pytest.raises(KeyboardInterrupt):
        answer_rows(die, iter(rows), output, 2)
    with output.open("a") as file:
        file.write('{"id": "2.png", "answ')
    assert answer_rows(answerer, iter(rows), output, 2)[0] == 3
    assert sorted(line["id"] for line in read(output)) == sorted(row["id"] for row in rows)
    assert answer_rows(answerer, iter(rows), output, 2) == (0, 0)


def test_a_data_set_brings_its_questions(answerer, pictures, tmp_path):
    from datasets import Dataset

    from convllava_hf.serving.batch import answer_rows, list_rows

    rows = {"question": ["What?", "And what?"], "images": [[pictures[0], pictures[1]], []], "id": ["a", "b"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "answers.jsonl"
    assert answer_rows(answerer, list_rows(str(tmp_path / "rows.parquet"), None), output) == (2, 0)
    assert [line["id"] for line in read(output)] == ["a", "b"]


def test_other_files_are_not_written_over(answerer, folder, tmp_path):
    from convllava_hf.serving.batch import answer_rows, list_rows

    output = tmp_path / "mine.txt"
    output.write_text("my notes\n")
    with pytest.raises(ValueError, match=r"mine\.txt"):
        answer_rows(answerer, list_rows(str(folder), "What?"), output)
    assert output.read_text() == "my notes\n"


def test_what_cannot_be_asked_is_said(tmp_path):
    from convllava_hf.serving.batch import list_rows

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        list(list_rows(str(tmp_path / "empty"), "What?"))
    with pytest.raises(ValueError, match="--question"):
        list(list_rows(str(tmp_path / "empty"), None))
    (tmp_path / "x.doc").touch()
    with pytest.raises(ValueError, match=r"\.parquet"):
        list(list_rows(str(tmp_path / "x.doc"), "What?"))
