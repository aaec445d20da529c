"""The exception tree: it pickles, and the sentence for the user is found behind what Ray raises."""

from __future__ import annotations

import pickle

import pytest
import ray

from emu_ray import errors
from emu_ray.errors import EmuRayError, InputError, JobFailedError, StationConflictError, StationError, find_in_chain

EVERY = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, EmuRayError)]


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_survives_pickling_and_exits_with_2_unless_it_is_our_fault(kind: type[EmuRayError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what was found")))
    assert type(again) is kind and str(again) == "what was found"
    assert again.exit_code == (1 if kind is JobFailedError else 2)


def test_a_conflict_is_caught_as_a_station_error() -> None:
    with pytest.raises(StationError):
        raise StationConflictError("two drivers")


def test_the_cause_behind_a_foreign_error_is_found() -> None:
    try:
        try:
            raise InputError("a.tar is broken")
        except InputError as cause:
            raise RuntimeError("task failed") from cause
    except RuntimeError as error:
        assert str(find_in_chain(error)) == "a.tar is broken"


def test_a_failure_of_one_training_worker_is_found() -> None:
    from ray.train import WorkerGroupError

    found = find_in_chain(WorkerGroupError("rank 1 failed", {1: InputError("no latents")}))
    assert isinstance(found, InputError) and str(found) == "no latents"


def test_a_bug_of_ours_is_not_taken_for_the_users_mistake() -> None:
    assert find_in_chain(ValueError("broadcast")) is None


def test_a_bug_in_the_handling_of_a_users_mistake_is_a_bug() -> None:
    try:
        try:
            raise InputError("a.tar is broken")
        except InputError:
            len(5)  # type: ignore[arg-type]
    except TypeError as error:
        assert find_in_chain(error) is None


def _raise(_: object) -> None:
    raise InputError("b.tar is broken")


def test_the_sentence_is_found_behind_a_ray_task(ray_local: None) -> None:
    with pytest.raises(Exception) as raised:
        ray.get(ray.remote(_raise).remote(0))
    assert str(find_in_chain(raised.value)) == "b.tar is broken"


def test_the_sentence_is_found_behind_ray_data_which_loses_the_cause(ray_local: None) -> None:
    with pytest.raises(Exception) as raised:
        ray.data.range(1).map_batches(_raise).materialize()
    found = find_in_chain(raised.value)
    assert isinstance(found, InputError) and str(found) == "b.tar is broken"
