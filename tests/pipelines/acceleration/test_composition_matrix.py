"""Every family with everything else that people do to a transformer: what comes of it is what the table says.

`docs/composition.md` has the table in words. A cell that changes is a change for users: `cd tests/support && python -m
composition` computes the table anew, `python tests/packaging/test_composition_docs.py` the page.
"""

from __future__ import annotations

import pytest
from composition import FAMILY_BUILDS, LEVERS, compute, read
from fast_set import slow
from tiny_families import build

from vidaccel.pipelines import FAMILIES

EXPECTED = read()
COMPILED = ("Wan 2.1 / 2.2", "HunyuanVideo")
"""The families whose blocks `make test` compiles, which takes many times as long as all other levers."""
CELLS = [
    slow((name, family)) if lever.lazy and family not in COMPILED else (name, family)
    for name, lever in LEVERS.items()
    for family in FAMILY_BUILDS
]


@pytest.mark.parametrize(("lever", "family"), CELLS)
def test_what_comes_of_both(lever, family):
    if not LEVERS[lever].installed:
        package = LEVERS[lever].package
        pytest.skip(f"needs {package}; the table has what {package} {EXPECTED['versions'][package]} did")
    assert compute(family, LEVERS[lever]) == EXPECTED["cells"][family][lever]


def test_broadcast_knows_no_branches_of_guidance():
    """As the page says: the first pass with another text has the attention of the one before."""
    tiny = build("wan")
    other = {name: tiny.given[name] + 1 for name in ("hidden_states", "encoder_hidden_states")}
    plain = [tiny.run(), tiny.run(**other)]
    LEVERS["broadcast"].apply(tiny)
    made = []
    for branch, changes in (("cond", {}), ("uncond", other)):
        with tiny.model.cache_context(branch):
            made.append(tiny.run(**changes))
    assert made[0].equal(plain[0]) and not made[1].allclose(plain[1], rtol=1e-3)


def test_the_table_is_whole():
    assert list(EXPECTED["cells"]) == [family.name for family in FAMILIES] == list(FAMILY_BUILDS)
    assert all(list(row) == list(LEVERS) for row in EXPECTED["cells"].values())
