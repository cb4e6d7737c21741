"""The recipes of CONTRIBUTING.md work as they are written."""

import json
import re
from pathlib import Path

import pytest

from moka.balance import STRATEGIES
from moka.data.formats import FORMATS, open_format
from moka.evaluation.benchmarks import BENCHMARKS
from moka.modeling.encoders import ENCODERS

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    re.search(r"## Adding an? (\w+)", part)[0].split()[-1]: re.search(r"```python\n(.*?)```", part, re.S)[1]
    for part in PAGE.split("\n## ")
    for part in [f"## {part}"]
    if "```python" in part
}
REGISTRIES = ENCODERS, FORMATS, BENCHMARKS, STRATEGIES


@pytest.fixture(autouse=True)
def registries():
    """Each recipe registers something; the registries are as before afterwards."""
    before = [dict(one) for one in REGISTRIES]
    yield
    for registry, kept in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(kept)


def test_the_page_has_a_recipe_for_each():
    assert set(RECIPES) == {"encoder", "reader", "benchmark", "balance"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name, tmp_path):
    exec(compile(RECIPES[name], f"CONTRIBUTING.md, {name}", "exec"), {"__name__": "recipe"})
    if name == "reader":
        (tmp_path / "test.json").write_text(json.dumps([{"riddle": "What has hands?", "answer": "a clock"}]))
        assert open_format("riddles", tmp_path, "test")[0]["messages"][1]["content"][0]["text"] == "a clock"
