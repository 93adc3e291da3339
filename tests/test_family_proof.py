"""Every family takes its first step as plain transformers and peft take it; docs/models.md says so."""

from pathlib import Path

import pytest

from mmtrain.errors import UserError
from support.family_proof import prove
from support.family_reference import FAMILIES, is_usable, save_images
from support.family_table import NOT_TRAINED, refusal, row, table

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.slow("one step of every family of models, three ways; tests/test_cuts.py has a few"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_TRAINED])
def test_the_first_step_is_that_of_plain_transformers(name: str, root: Path, tmp_path: Path) -> None:
    """And the page says what was found."""
    if not is_usable(name):
        pytest.skip(f"needs {FAMILIES[name].needs}")
    proof = prove(name, root, tmp_path)
    assert proof.failures == []
    assert table()[name] == row(name, proof)


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_the_others_are_refused_in_one_line(name: str, root: Path, tmp_path: Path) -> None:
    if not is_usable(name):
        pytest.skip(f"needs {FAMILIES[name].needs}")
    with pytest.raises(UserError) as refused:
        prove(name, root, tmp_path)
    assert "\n" not in str(refused.value)


def test_the_page_has_every_family() -> None:
    found = table()
    assert found.keys() == FAMILIES.keys()
    assert all(found[name] == refusal(name) for name in NOT_TRAINED)
