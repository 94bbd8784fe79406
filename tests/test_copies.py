import blosc2
import numpy as np
import pytest

from pcrl_nnunet import copies
from pcrl_nnunet.copies import find_copies, with_known_voxels
from pcrl_nnunet.data import Case, fingerprint


@pytest.fixture
def make(tmp_path):
    """Writes a case of noise in a file of its own."""

    def make(name, seed, shape=(1, 6, 7, 8), ending=".b2nd"):
        voxels, path = np.random.default_rng(seed).normal(size=shape).astype(np.float32), str(tmp_path / name) + ending
        if ending == ".b2nd":
            blosc2.asarray(voxels, urlpath=path)
        else:
            np.save(path, voxels) if ending == ".npy" else np.savez(path, data=voxels)
        return Case(name, path)

    return make


def test_copies_are_found_whatever_the_form_of_the_preprocessed_file(make):
    originals = [make(f"case_{seed}", seed) for seed in range(3)]
    others = [make("other", 9), make("same_voxels_in_another_shape", 0, (1, 8, 7, 6))]
    found = [make("a", 0), make("b", 1, ending=".npy"), make("c", 2, ending=".npz"), make("d", 0)]
    expected = dict(zip(found, [*originals, originals[0]], strict=True))
    assert find_copies([*others, *found], originals) == expected
    assert find_copies([], originals) == find_copies(found, []) == {}


def test_the_channels_count(make):
    assert not find_copies([make("two", 0, (2, 6, 7, 8))], [make("one", 0)])


def test_of_cases_with_other_shapes_no_voxel_is_read(make, monkeypatch):
    read = []
    monkeypatch.setattr(copies, "fingerprint", lambda case: read.append(case.name) or fingerprint(case))
    originals = [make("case_0", 0), make("case_1", 1, (1, 9, 9, 9))]
    cases = [make(f"scan_{n}", n, (1, 5, 5, n)) for n in range(5, 25)]
    assert find_copies(cases, originals) == {}
    assert read == []
    assert find_copies([*cases, make("copy", 0)], originals) != {}
    assert sorted(read) == ["case_0", "copy"]


def test_a_case_is_known_by_its_voxels(make):
    cases = [make("a", 0), make("b", 1)]
    assert with_known_voxels(cases, {fingerprint(cases[1]): "seen"}) == {cases[1]: "seen"}
    assert with_known_voxels(cases, {}) == {}
