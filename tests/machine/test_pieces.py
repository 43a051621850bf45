"""Pieces of long work: found again by the same command, and by no other."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from lab.machine.files import write_tensors
from lab.machine.pieces import Pieces, digest_of_files


@dataclasses.dataclass(frozen=True)
class Inner:
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Found:
    """All that a piece may hold."""

    answers: np.ndarray
    by_name: dict[str, np.ndarray]
    several: list[np.ndarray]
    inner: Inner
    missing: np.ndarray | None

    @classmethod
    def from_fields(cls, inner, **fields):
        return cls(inner=Inner(**inner), **fields)


def draw(seed):
    rng = np.random.default_rng(seed)
    return Found(
        answers=rng.random((3, 2)) < 0.5,
        by_name={"other": rng.normal(size=4).astype(np.float32)},
        several=[rng.normal(size=(2, k)) for k in (1, 2)],
        inner=Inner(rng.integers(0, 9, 5)),
        missing=None,
    )


def get(pieces, seed=0, owner="baseline_seed42", kind="fog", **depends_on):
    return pieces.get(owner, kind, depends_on, lambda: draw(seed), Found.from_fields)


def is_same(one, other):
    assert one.answers.dtype == other.answers.dtype == bool
    assert one.by_name["other"].dtype == np.float32
    pairs = [(one.answers, other.answers), (one.by_name["other"], other.by_name["other"])]
    pairs += [*zip(one.several, other.several, strict=True), (one.inner.values, other.inner.values)]
    return one.missing is other.missing is None and all(np.array_equal(*pair) for pair in pairs)


def test_a_killed_runs_pieces_are_found_to_the_bit(tmp_path):
    made = get(Pieces(tmp_path, {"code": 1}), network="abc")
    again = Pieces(tmp_path, {"code": 1})
    assert is_same(get(again, seed=1, network="abc"), made)  # drawn from 1 it would be another
    assert (again.found, again.made) == (1, 0)
    assert again.say() == "1 of 1 measurements were there already"


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "snow", "network": "abc"},
        {"owner": "baseline_seed43", "network": "abc"},
        {"network": "abd"},
        {"network": "abc", "steps": 3},
        {},
    ],
)
@pytest.mark.parametrize("is_whole", [False, True])
def test_what_depends_on_anything_else_is_not_met(tmp_path, other, is_whole):
    before = Pieces(tmp_path, {"code": 1})
    get(before, network="abc")
    if is_whole:
        before.join()
    pieces = Pieces(tmp_path, {"code": 1})
    assert is_same(get(pieces, seed=1, **other), draw(1))
    other_code = Pieces(tmp_path, {"code": 2})
    assert is_same(get(other_code, seed=2, network="abc"), draw(2))
    assert (pieces.found, other_code.found) == (0, 0)


def spoil(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_damaged_piece_is_made_anew(tmp_path, damage, is_whole):
    before = Pieces(tmp_path)
    get(before)
    if is_whole:
        before.join()
    (path,) = tmp_path.rglob("*.pth")
    spoil(path, damage)
    pieces = Pieces(tmp_path)
    assert is_same(get(pieces, seed=1), draw(1))
    assert (pieces.found, pieces.made) == (0, 1)
    pieces.join()
    assert is_same(get(Pieces(tmp_path), seed=2), draw(1))


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_piece_under_anothers_name_is_made_anew(tmp_path, is_whole):
    before = Pieces(tmp_path)
    get(before)
    get(before, seed=1, owner="baseline_seed43")
    if is_whole:
        before.join()
    one, other = sorted(tmp_path.rglob("*.pth"))
    other.write_bytes(one.read_bytes())
    pieces = Pieces(tmp_path)
    assert is_same(get(pieces, seed=2, owner="baseline_seed43"), draw(2))
    assert (pieces.found, pieces.made) == (0, 1)


def test_another_programs_file_is_made_anew(tmp_path):
    write_tensors(tmp_path / "baseline_seed42.pth", {"weights": torch.zeros(3)})
    pieces = Pieces(tmp_path)
    assert is_same(get(pieces), draw(0))
    pieces.join()
    assert is_same(get(Pieces(tmp_path), seed=1), draw(0))


def test_a_whole_run_leaves_one_file_for_each_owner_of_what_it_used(tmp_path):
    killed = Pieces(tmp_path)
    for kind in ("fog", "snow"):
        get(killed, kind=kind)
    run = Pieces(tmp_path)
    for owner in ("baseline_seed42", "baseline_seed43"):
        get(run, owner=owner)
    run.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "baseline_seed42.pth",
        "baseline_seed43.pth",
    ]
    more = Pieces(tmp_path)
    for owner in ("baseline_seed42", "baseline_seed43", "baseline_seed44"):
        get(more, owner=owner)
    get(more, kind="snow")
    assert (more.found, more.made) == (2, 2)
    assert more.say() == "2 of 4 measurements were there already"
    more.join()
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pieces = Pieces()
    assert is_same(get(pieces), draw(0)) and is_same(get(pieces, seed=1), draw(1))
    pieces.join()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_lose_what_was_measured(tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("lab.machine.pieces.write_tensors", refuse)
    pieces = Pieces(tmp_path)
    assert is_same(get(pieces), draw(0))
    with pytest.raises(OSError, match="No space left"):
        pieces.join()


def test_threads_share_pieces(tmp_path):
    pieces = Pieces(tmp_path)
    threads = []
    for k in range(8):
        threads.append(threading.Thread(target=get, args=(pieces, k), kwargs={"kind": f"kind{k}"}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (pieces.made, len(list(tmp_path.rglob("*.pth")))) == (8, 8)
    pieces.join()
    again = Pieces(tmp_path)
    for k in range(8):
        assert is_same(get(again, seed=99, kind=f"kind{k}"), draw(k))


def test_source_is_known_by_its_bytes(tmp_path):
    path = tmp_path / "room.py"
    path.write_text("x = 1\n")
    before = digest_of_files([path])
    assert digest_of_files([path]) == before
    path.write_text("x = 2\n")
    assert digest_of_files([path]) != before
