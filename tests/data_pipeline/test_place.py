"""Where a run stands in its data, written and read again; another order is refused."""

from __future__ import annotations

import numpy as np
import pytest

from imdm_scale.data.place import FILE_NAME, Place
from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.errors import UserError


def stream(seed=3, first=0):
    return TokenStream(ArrayCorpus(np.arange(first, first + 12).reshape(4, 3)), seed)


def test_written_and_read_again(tmp_path):
    place = Place.of(stream(), samples=10**12)
    place.write(tmp_path)
    assert Place.read(tmp_path) == place
    place.check(stream())


def test_other_data_and_other_seeds_are_refused():
    place = Place.of(stream(), samples=5)
    with pytest.raises(
        UserError, match=r"data\.continue_from counts 5 samples of data .* name the same prepared data"
    ):
        place.check(stream(first=1))
    with pytest.raises(UserError, match=r"in the order of seed 3, but seed is 4; set seed=3"):
        place.check(stream(seed=4))


def test_no_place_and_a_damaged_one(tmp_path):
    with pytest.raises(UserError, match=rf"has no {FILE_NAME} \(No such file"):
        Place.read(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"samples": 3}')
    with pytest.raises(UserError, match="is damaged; name another checkpoint"):
        Place.read(tmp_path)
