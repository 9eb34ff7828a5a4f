"""Prompts from text, files, sets of the package and datasets, and how episodes draw them."""

import json
import sys
from collections import Counter

import gymnasium
import numpy as np
import pytest

from flowgym_gym.errors import MissingExtraError, OptionError
from flowgym_gym.models.stable_diffusion import EMBEDDED
from flowgym_gym.prompts import SETS, read_prompts
from tests.conftest import RED

CONCEPTS = (EMBEDDED / "tiny" / "concepts.txt").read_text(encoding="utf-8").splitlines()


def test_a_prompt_a_list_and_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog # 1 \n", encoding="utf-8")
    assert read_prompts("a cat") == ["a cat"]
    assert read_prompts(["a cat", "a dog"]) == ["a cat", "a dog"]
    assert read_prompts(str(path)) == ["a cat", "a dog # 1"]


def test_json_lines_hold_prompts_under_a_field(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a cat", "caption": "Katze"}, {"prompt": "a dog", "caption": "Hund\nund"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_prompts(str(path)) == ["a cat", "a dog"]
    assert read_prompts(f"{path}#caption") == ["Katze", "Hund\nund"]
    with pytest.raises(OptionError, match=r"line 1 of .*expected an object with 'text'"):
        read_prompts(f"{path}#text")
    path.write_text('{"prompt": "a cat"}\nnot json', encoding="utf-8")
    with pytest.raises(OptionError, match=r"line 2 of .*'not json'"):
        read_prompts(str(path))
    with pytest.raises(OptionError, match="cannot be read"):
        read_prompts("nowhere.jsonl")


def test_the_sets_of_concepts_are_apart_and_together_everything_the_checkpoint_draws():
    train, held_out = read_prompts("set:concepts-train"), read_prompts("set:concepts-held-out")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(f"a photo of a {name}" for name in CONCEPTS)
    assert len(held_out) == 64


def test_ddpos_sets_are_45_animals_and_three_activities():
    animals, activities = read_prompts("set:ddpo-animals"), read_prompts("set:ddpo-activities")
    assert len(set(animals)) == 45
    assert {"a cat", "an ant", "a kangaroo"} <= set(animals)
    ends = Counter(
        text.removeprefix(animal + " ") for animal in animals for text in activities if text.startswith(animal + " ")
    )
    assert ends == {"washing the dishes": 45, "riding a bike": 45, "playing chess": 45}
    assert len(set(activities)) == 135


@pytest.mark.parametrize("name", SETS)
def test_the_embedded_checkpoint_takes_every_set(name):
    env = gymnasium.make(RED, discretization_steps=1, prompts=f"set:{name}")
    observation, info = env.reset(seed=0)
    assert info["prompt"] in read_prompts(f"set:{name}")
    assert env.observation_space.contains(observation)


def test_prompts_are_drawn_from_the_environments_own_generator():
    def drawn(seed, n=6):
        env = gymnasium.make(RED, discretization_steps=1, prompts="set:concepts-train")
        env.reset(seed=seed)
        observations = [env.reset() for _ in range(n)]
        return [info["prompt"] for _, info in observations], np.stack([o["prompt"] for o, _ in observations])

    np.random.seed(0)
    prompts, embeddings = drawn(3)
    np.random.seed(1)
    again, _ = drawn(3)
    assert prompts == again
    assert drawn(4)[0] != prompts
    assert len(set(prompts)) > 3
    for i, prompt in enumerate(prompts):
        for j, other in enumerate(prompts):
            assert np.array_equal(embeddings[i], embeddings[j]) == (prompt == other)


def test_a_vector_draws_every_prompt_of_a_set_equally_often():
    prompts = ["a cat", "a dog", "a fox", "a bear"]
    envs = gymnasium.make_vec(RED, num_envs=16, discretization_steps=1, prompts=prompts)
    counts = Counter()
    for seed in range(25):
        counts.update(envs.reset(seed=100 * seed)[1]["prompt"].tolist())
    assert set(counts) == set(prompts)
    # 400 draws with probability 1/4 have a standard deviation of 8.7.
    assert all(abs(count - 100) < 40 for count in counts.values())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("set:concepts-trian", "did you mean 'concepts-train'"),
        ("missing.txt", "text file 'missing.txt', which cannot be read"),
        ("dataset:somewhere", "expected 'dataset:NAME#COLUMN'"),
        ("dataset:somewhere[test#prompt", "expected 'dataset:NAME#COLUMN'"),
        ([], "expected a prompt, a list of prompts"),
        (["a cat", 3], "expected a prompt, a list of prompts"),
        ("", "expected a prompt, a list of prompts"),
        (7, "prompts is 7"),
    ],
)
def test_what_cannot_be_used_is_named(prompts, message):
    with pytest.raises(OptionError, match=message):
        read_prompts(prompts)


def test_a_dataset_without_its_library_says_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flowgym_gym\[datasets\]'"):
        read_prompts("dataset:somewhere#prompt")


def test_a_column_of_a_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"caption": ["a cat", "a dog"], "n": [1, 2]})
    rows = datasets.Dataset(table, fingerprint="rows")
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "split")
    assert read_prompts(f"dataset:{tmp_path / 'plain'}#caption") == ["a cat", "a dog"]
    assert read_prompts(f"dataset:{tmp_path / 'split'}[test]#caption") == ["a cat", "a dog"]
    with pytest.raises(OptionError, match=r"which cannot be read: .*text"):
        read_prompts(f"dataset:{tmp_path / 'plain'}#text")
    with pytest.raises(OptionError, match="expected a prompt"):
        read_prompts(f"dataset:{tmp_path / 'plain'}#n")
