"""Prompts from text, files, sets of the package and datasets, and how episodes draw them."""

import csv
import json
import os
import sys
from collections import Counter, deque
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from flowgym_gym.errors import MissingExtraError, OptionError
from flowgym_gym.models.loading import load_base_model
from flowgym_gym.models.stable_diffusion import EMBEDDED
from flowgym_gym.prompts import SETS, prompts_file, read_prompts, resolved
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
    with pytest.raises(OptionError, match=r"no 'text' among the names of line 1"):
        read_prompts(f"{path}#text")
    path.write_text('{"prompt": "a cat"}\nnot json', encoding="utf-8")
    with pytest.raises(OptionError, match=r"prompts\.jsonl': line 2 is no JSON"):
        read_prompts(str(path))
    with pytest.raises(OptionError, match=r"'nowhere\.jsonl', which does not exist"):
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
        text.removeprefix(animal + " ")
        for animal in animals
        for text in activities
        if text.startswith(animal + " ")
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
        return [info["prompt"] for _, info in observations], np.stack(
            [o["prompt"] for o, _ in observations]
        )

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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that names are relative to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


PROMPTS = ["a cat", 'a "big" dog, on\na mat', "x\u2028y\x85z\x0b\x0c\x1c\x1d\x1e", " \U0001f600 "]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["p.csv", "P.CSV", "p.tsv"])
def test_tables_hold_prompts_in_a_named_column_as_the_csv_module_writes_them(
    folder, name, encoding
):
    with open(name, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerow(["prompt", " n", "in words"])
        writer.writerows([prompt, i, f"{prompt}!"] for i, prompt in enumerate(PROMPTS))
    assert read_prompts(name) == PROMPTS
    assert read_prompts(f"{name}#prompt") == PROMPTS
    assert read_prompts(f"{name}#in words") == [f"{prompt}!" for prompt in PROMPTS]
    assert read_prompts(folder / f"{name}#n") == ["0", "1", "2", "3"]
    with pytest.raises(
        OptionError, match=r"no 'Prompt' among the columns .*\['prompt', 'n', 'in words'\]; did you"
    ):
        read_prompts(f"{name}#Prompt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.NDJSON"])
def test_json_holds_prompts_as_the_json_module_writes_them(folder, name, ascii, encoding):
    rows = [{"prompt": prompt, "other": f"{prompt}!"} for prompt in PROMPTS]
    whole = name.endswith("json")
    dumped = [json.dumps(row, ensure_ascii=ascii) for row in ([rows] if whole else rows)]
    Path(name).write_text("\n".join(dumped), encoding=encoding)
    assert read_prompts(name) == PROMPTS
    assert read_prompts(f"{name}#other") == [f"{prompt}!" for prompt in PROMPTS]
    if whole:
        Path(name).write_text(json.dumps(PROMPTS, ensure_ascii=ascii), encoding=encoding)
        assert read_prompts(name) == PROMPTS
        Path(name).write_text(
            json.dumps({"a": ["x"], "prompt": PROMPTS}, ensure_ascii=ascii), encoding=encoding
        )
        assert read_prompts(name) == PROMPTS
        assert read_prompts(f"{name}#a") == ["x"]


def test_lines_of_text_end_at_newlines_only_and_marks_of_joined_files_are_no_text(folder):
    lines = ["a cat\x85sits", "x\u2028y\u2029z", "a\x0bb\x0cc\x1cd\x1de\x1ef", "a cat # 1", "a cat"]
    for newline in ("\n", "\r\n", "\r"):
        Path("p.txt").write_bytes(("\ufeff" + newline.join([*lines, "", " "])).encode())
        assert read_prompts("p.txt") == lines
    Path("joined.txt").write_bytes("\ufeffa cat\n\ufeffa dog\n".encode())
    assert read_prompts("joined.txt") == ["a cat", "a dog"]


def test_a_byte_order_mark_does_not_change_the_picture(folder):
    Path("p.txt").write_bytes("\ufeffa red heart\n".encode())
    observations = [
        gymnasium.make(RED, discretization_steps=1, prompts=prompts).reset(seed=0)[1]["prompt"]
        for prompts in (
            "p.txt",
            "a red heart",
            Path("p.txt"),
            np.array(["a red heart"]),
            ("a red heart",),
        )
    ]
    assert observations == ["a red heart"] * 5


def test_sequences_of_text_are_prompts_as_they_are():
    for prompts in (["p.csv", " a ", "a", "a"], ("p.csv",), deque(["x"]), np.array(["p.csv", "b"])):
        found = read_prompts(prompts)
        assert found == list(prompts)
        assert {type(prompt) for prompt in found} == {str}


FILES = {
    "header.csv": ("prompt,n\n", "holds no prompts"),
    "empty.csv": ("", "holds no prompts"),
    "empty.txt": (" \n\n", "holds no prompts"),
    "empty.jsonl": ("", "holds no prompts"),
    "empty.json": ("", r"line 1 is no JSON"),
    "none.json": ("[]", "holds no prompts"),
    "headless.csv": ("a cat\na dog\n", r"no 'prompt' among the columns .*\['a cat'\]"),
    "semicolons.csv": ("prompt;n\na, b;1\n", r"\['prompt;n'\]"),
    "long.csv": (
        "prompt\na cat\na cat, sitting\n",
        "line 3 has 2 cells, but the first line names 1 columns",
    ),
    "short.csv": (
        'prompt,n\n"a\ncat",1\na dog\n',
        "line 4 has 1 cells, but the first line names 2 columns",
    ),
    "open.csv": ('prompt\na\n"b\nc\n', "row that begins in line 3 cannot be read: unexpected end"),
    "twice.csv": ("prompt,prompt\na,b\n", "column 'prompt' is there 2 times"),
    "blank.csv": (
        'prompt,n\n"a\ncat",1\n ,2\n',
        "line 4 holds ' ', expected a text that is not blank",
    ),
    "string.json": ('"a cat"', "holds 'a cat', expected a list of prompts"),
    "number.json": ('["a cat", 3]', "entry 2 holds 3, expected a text"),
    "half.json": (
        '["a cat", "\\ud83d"]',
        r"entry 2 holds '\\ud83d', which holds '\\ud83d', half of a character",
    ),
    "twice.json": ('[\n{"prompt": "a", "prompt": "b"}]', "an object holds 'prompt' twice"),
    "comma.json": ('[\n"a cat",\n]', "line 3 is no JSON"),
    "lines.json": ('{"prompt": "a"}\n{"prompt": "b"}', r"line 2 is no JSON: .* is a \.jsonl file"),
    "deep.json": ("[" * 100_000, "recursion"),
    "digits.json": ("[" + "9" * 5000 + "]", "4300 digits"),
    "orient.json": ('{"prompt": {"0": "a"}}', "expected a list of prompts under that name"),
    "fields.json": (
        '[{"prompt": "a"}, {"text": "b"}]',
        r"no 'prompt' among the names of entry 2, \['text'\]",
    ),
    "half.jsonl": ('{"prompt": "a"}\n\n{"prompt": "\\udc00"}', r"line 3 holds '\\udc00'"),
    "null.jsonl": ('{"prompt": null}', "line 1 holds None, expected a text"),
    "strings.jsonl": ('"a cat"', "line 1 is 'a cat', expected an object with 'prompt'"),
    "latin.txt": (
        "ok\r\nok\r\ncaf\xe9".encode("latin-1"),
        r"line 3 is not UTF-8 \(byte 0xe9\); save it as UTF-8",
    ),
    "utf16.txt": ("a cat".encode("utf-16"), "is UTF-16 or UTF-32; save it as UTF-8"),
    "utf16.csv": ("prompt\na cat".encode("utf-16-le"), "line 1 holds NUL"),
    "utf32.txt": ("a cat".encode("utf-32"), "is UTF-16 or UTF-32"),
    "data.yaml": ("- a cat", r"prompts are read from files that end in \.txt, \.csv, \.tsv"),
    "data.parquet": (b"PAR1", r"prompts are read from files that end in"),
    "prompts.txt.gz": (b"\x1f\x8b", "; unpack it, and name the file within"),
    "notes": ("a cat", ", but prompts are read from files that end in"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_line(folder, name):
    content, message = FILES[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for prompts in (name, folder / name):
        with pytest.raises(OptionError, match=rf"{name}'.*{message}"):
            read_prompts(prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("x.csv", r"the file 'x\.csv', which does not exist; .* is given in a list, \['x\.csv'\]"),
        ("x.csv#text", r"the file 'x\.csv', which does not exist"),
        (" X.TXT\n", r"the file 'X\.TXT', which does not exist"),
        ("a poster that says readme.md", r"\['a poster that says readme\.md'\]"),
        ("x.yml", "does not exist"),
        ("x.parquet/", "does not exist"),
        ("a#b.tsv", r"the file 'a#b\.tsv', which does not exist"),
        ("./prompts", "does not exist"),
        ("/nowhere/prompts", "does not exist"),
        ("C:\\prompts", "does not exist"),
        (Path("prompts"), "the file 'prompts', which does not exist$"),
        ("~nosuchuser/x.txt", "but there is no user 'nosuchuser'"),
        ("~nosuchuser/x", "but there is no user 'nosuchuser'"),
        ("x" * 5000 + ".txt", r"\(5004 characters\), which does not exist"),
        ("a\0.txt", "does not exist"),
        ("\ud83d.txt", "does not exist"),
        ("folder", "the folder 'folder', but prompts are read from files"),
        ("folder#x", "the folder 'folder'"),
        ("folder.txt", "the folder 'folder.txt'"),
        ("link", "a link to nothing"),
        ("pipe.txt", "no regular file"),
        ("text.txt#prompt", "a text file has no columns, but 'prompt' is asked for"),
        ("https://example.com/prompts.txt", "the address .* download it"),
        ("s3://prompts", "the address"),
    ],
)
def test_what_names_a_place_is_never_a_prompt_unless_it_is_listed(folder, prompts, message):
    for name in ("folder", "folder.txt"):
        os.mkdir(name)
    os.symlink("nothing", "link")
    os.mkfifo("pipe.txt")
    Path("text.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        read_prompts(prompts)
    if isinstance(prompts, str) and "\0" not in prompts and "\ud83d" not in prompts:
        assert read_prompts([prompts]) == [prompts]


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat.",
        "v1.5",
        "cat.png",
        "Set: a garden with a gnome",
        "/imagine a cat",
        "a #1 cat",
        "x" * 5000,
        pytest.param("#" * 2_000_000, id="hashes"),
        "~",
    ],
)
def test_other_texts_stay_prompts(folder, monkeypatch, prompt):
    monkeypatch.setenv("HOME", str(folder / "nowhere"))
    assert read_prompts(prompt) == [prompt]
    assert prompts_file(prompt) is None
    assert resolved(prompt) == prompt


def test_of_a_name_with_hashes_the_longest_part_that_is_a_file_is_the_path(folder):
    Path("a#b.txt").write_text("hash", encoding="utf-8")
    Path("a.csv").write_text("prompt,x#y.txt\none,two\n", encoding="utf-8")
    assert read_prompts("a#b.txt") == ["hash"]
    assert read_prompts("a.csv#x#y.txt") == ["two"]
    Path("a.csv#x").write_text("", encoding="utf-8")
    assert prompts_file("a.csv#x") == folder / "a.csv#x"
    assert prompts_file("a.csv#x#y.txt") == folder / "a.csv#x"


def test_home_and_environment_of_a_path_are_found_from_every_folder(folder, monkeypatch):
    (folder / "home").mkdir()
    (folder / "home" / "p.csv").write_text("prompt,x\na cat,a dog\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.chdir(folder / "home")
    for prompts in (
        "p.csv#x",
        "~/p.csv#x",
        "./p.csv#x",
        Path("p.csv#x"),
        str(folder / "home" / "p.csv#x"),
    ):
        assert prompts_file(prompts) == folder / "home" / "p.csv"
        assert resolved(prompts) == f"{folder / 'home' / 'p.csv'}#x"
    absolute = resolved("p.csv#x")
    monkeypatch.chdir("/")
    assert read_prompts(absolute) == ["a dog"]
    assert prompts_file("missing.txt") == Path("/missing.txt")


@pytest.mark.parametrize(
    "prompts", ["a cat", ["p.txt"], "set:ddpo-animals", "dataset:a/b#c", None, 7]
)
def test_what_names_no_file_is_resolved_as_it_is(folder, prompts):
    assert prompts_file(prompts) is None
    assert resolved(prompts) is prompts


def test_the_folder_of_a_dataset_is_resolved(folder):
    os.mkdir("data")
    assert prompts_file("dataset:data[test]#text") is None
    assert resolved("dataset:data[test]#text") == f"dataset:{folder / 'data'}[test]#text"


@pytest.mark.parametrize(
    "prompts", ["SET:ddpo-animals", " set: ddpo-animals\n", "sets:ddpo-animals"]
)
def test_how_a_set_is_spelled_makes_no_prompt_of_it(prompts):
    assert read_prompts(prompts) == read_prompts("set:ddpo-animals")


def test_a_default_prompt_is_a_prompt_whatever_lies_in_the_folder(folder):
    from tests.models import tiny

    checkpoint = tiny.folder("dit")
    os.mkdir("0")
    assert load_base_model("images/dit", checkpoint=checkpoint).prompts == ["0"]


@pytest.mark.parametrize(
    ("prompt", "message"), [("p.TXT ", "the name of a file"), ("\ud83d", "half"), (5, "a text")]
)
def test_a_negative_prompt_is_a_text(prompt, message):
    with pytest.raises(OptionError, match=f"negative_prompt is .*{message}"):
        gymnasium.make(RED, negative_prompt=prompt)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("set:concepts-trian", "did you mean 'concepts-train'"),
        ("set: concepts-train x", r"\['set:concepts-train x'\]"),
        ("concepts-train", "write 'set:concepts-train'"),
        ("dataset:./nowhere#prompt", "'./nowhere' does not exist"),
        ("dataset:~nosuchuser/x#prompt", "'~nosuchuser/x' does not exist"),
        (f"dataset:{__file__}#prompt", "is a file; expected a dataset's folder"),
        ("dataset:somewhere", "expected 'dataset:NAME#COLUMN'"),
        ("dataset:somewhere[test#prompt", "expected 'dataset:NAME#COLUMN'"),
        ([], "expected a prompt, a list of prompts"),
        (["a cat", 3], "entry 1 of prompts is 3, expected a text"),
        (["a cat", " "], "entry 1 of prompts is ' ', expected a text that is not blank"),
        ([b"a cat"], "entry 0 of prompts is b'a cat'"),
        (np.array([1.0]), "entry 0 of prompts is 1.0"),
        ("", "prompts is '', expected a text that is not blank"),
        (7, "prompts is 7, expected a prompt"),
        (None, "prompts is None, expected a prompt"),
        (b"a cat", "prompts is b'a cat', expected a prompt"),
        ({"a cat"}, "prompts is {'a cat'}, expected a prompt"),
        ({"a cat": 1}, "expected a prompt"),
        (iter(["a cat"]), "expected a prompt"),
        (np.array("a cat"), "expected a prompt"),
        (np.array([["a cat"]]), "expected a prompt"),
        ("a \ud83d", r"holds '\\ud83d', half of a character"),
        (["a cat", "a \udcff"], r"entry 1 .*holds '\\udcff', half of a character"),
        ("a\0cat", "holds NUL"),
        ("\ufeffa cat", "begins with a byte-order mark"),
    ],
)
def test_what_cannot_be_used_is_named(prompts, message):
    with pytest.raises(OptionError, match=message):
        read_prompts(prompts)


def test_a_dataset_without_its_library_says_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flowgym_gym\[datasets\]'"):
        read_prompts("dataset:somewhere#prompt")


def test_a_column_of_a_dataset_on_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"caption": ["a cat", "a dog"], "n": [1, 2]})
    rows = datasets.Dataset(table, fingerprint="rows")
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "split")
    assert read_prompts(f"dataset:{tmp_path / 'plain'}#caption") == ["a cat", "a dog"]
    assert read_prompts(f"dataset:{tmp_path / 'split'}[test]#caption") == ["a cat", "a dog"]
    with pytest.raises(OptionError, match=r"which cannot be read: .*text"):
        read_prompts(f"dataset:{tmp_path / 'plain'}#text")
    with pytest.raises(OptionError, match=r"row 0 of .*#n' is 1, expected a text"):
        read_prompts(f"dataset:{tmp_path / 'plain'}#n")
    monkeypatch.chdir(tmp_path)
    assert read_prompts(resolved("dataset:split[test]#caption")) == ["a cat", "a dog"]
