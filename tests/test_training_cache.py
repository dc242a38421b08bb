"""The cache of frozen prefixes: the same numbers from memory and from disk, rebuilt when damaged, done without when it must."""

import copy
import dataclasses
import errno
import json
import shutil
import threading

import jax
import numpy as np
import pytest

from dapt_jax.data import decode
from dapt_jax.data.augment import Augment
from dapt_jax.errors import UserError
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.runtime import processes
from dapt_jax.study import plan
from dapt_jax.training import accounting
from dapt_jax.training.cache import disk, policy
from dapt_jax.training.cache.policy import Caching, choose_cache
from dapt_jax.training.cache.store import ActivationCache, Prefix
from dapt_jax.training.phases import Phase
from tests import tiny
from tests.test_training_loop import KilledError, KillingLedger, counts, curve, train

ENCODER, DATA = tiny.encoder(), tiny.dataset()
VIEWS = Augment("dihedral", 0.1, 0.2, 0.2)
PARTIAL = Phase("partial", 3, ("stage3", "head"), 1e-2, views=2)
ON_DISK = Caching("on", memory_bytes=0, disk_bytes=1 << 28)


def run_of(caching=ON_DISK, phase=PARTIAL):
    return tiny.make_run([phase], encoder=ENCODER, data=DATA, augment=VIEWS, cache=caching)


def cache_in(folder, said=None, memory=0, disk=1 << 28, dtype=""):
    return ActivationCache.open(memory, disk, folder, dtype, (said if said is not None else []).append)


@pytest.fixture(scope="module")
def uncached():
    return train(run_of(Caching("off")))


@pytest.fixture(scope="module")
def prefix():
    """The prefix of the phase, and the weights it is computed with."""
    run = run_of()
    params, batch_stats = run.programs[0].model.init(1)
    return Prefix.of(run.programs[0], 2), params, batch_stats


def shards(folder):
    return sorted(path for path in folder.glob("*/*/c/**/*") if path.is_file())


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def relative_difference(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_a_run_from_disk_gives_the_numbers_of_the_uncached_one_and_a_second_start_reads_them(
    tmp_path, uncached
):
    trained, rows = train(run_of(), cache=cache_in(tmp_path))
    assert relative_difference(trained, uncached[0]) < 1e-5
    np.testing.assert_allclose(curve(rows), curve(uncached[1]), rtol=1e-5)
    again, second = train(run_of(), cache=cache_in(tmp_path))
    assert same(trained, again)
    assert [rows[0].cached, second[0].cached] == ["filled", "reused"]
    assert second[0].model_flops + second[0].reused_flops == rows[0].model_flops
    assert second[0].reused_s > 0


@pytest.mark.long
def test_two_hundred_steps_differ_by_less_than_a_hundred_thousandth_wherever_the_prefix_comes_from(tmp_path):
    phase = Phase("partial", 50, ("stage3", "head"), 1e-3, views=2)
    found = {
        "off": train(run_of(Caching("off"), phase)),
        "memory": train(run_of(Caching("on"), phase)),
        "disk": train(run_of(ON_DISK, phase), cache=cache_in(tmp_path)),
    }
    assert found["off"][1][0].steps == 200
    for tier in ("memory", "disk"):
        assert relative_difference(found["off"][0], found[tier][0]) < 1e-5
        np.testing.assert_allclose(curve(found["off"][1]), curve(found[tier][1]), rtol=1e-5)


def test_half_precision_takes_half_the_bytes_and_little_of_the_accuracy(prefix, tmp_path):
    part, params, batch_stats = prefix
    exact = cache_in(tmp_path / "a").get(part, params, batch_stats, DATA.images, "disk")
    half = cache_in(tmp_path / "b", dtype="bfloat16").get(part, params, batch_stats, DATA.images, "disk")
    a, b = exact.rows(1, np.arange(40)), half.rows(1, np.arange(40))
    assert (a.dtype.name, b.dtype.name) == ("float32", "bfloat16")
    np.testing.assert_allclose(a, b.astype(np.float32), rtol=2**-8)
    sizes = [sum(path.stat().st_size for path in shards(tmp_path / name)) for name in "ab"]
    raw = a.nbytes * 2  # two views
    assert sizes[0] - sizes[1] == raw // 2


def test_views_are_those_of_the_uncached_pipeline(prefix, tmp_path):
    part, params, batch_stats = prefix
    rows = np.asarray([3, 0, 17, 3], np.int32)
    found = cache_in(tmp_path).get(part, params, batch_stats, DATA.images, "disk")
    program = run_of().programs[0]
    for view in range(2):
        draw = {"seed": np.uint32(program.seed), "view": np.int32(view)}
        state = {"params": params, "batch_stats": batch_stats}
        expected, _ = jax.jit(program.inputs)(state, DATA.images.batch(rows), draw, rows)
        np.testing.assert_allclose(found.rows(view, rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no entry", "another format"])
def test_a_damaged_entry_is_noticed_and_computed_again(prefix, tmp_path, damage):
    part, params, batch_stats = prefix
    rows = np.arange(40)
    whole = cache_in(tmp_path).get(part, params, batch_stats, DATA.images, "disk").rows(0, rows)
    (shard, *_), (entry,) = shards(tmp_path), tmp_path.glob("*/entry.json")
    if damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 255
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no entry":
        entry.unlink()
    else:
        entry.write_text(json.dumps({**json.loads(entry.read_text()), "format": 0}))
    said = []
    again = cache_in(tmp_path, said).get(part, params, batch_stats, DATA.images, "disk")
    np.testing.assert_array_equal(again.rows(0, rows), whole)
    assert len(said) == 1
    assert "damaged" in said[0]
    assert "\n" not in said[0]


def test_a_run_goes_on_over_damage_in_its_middle(tmp_path, uncached):
    said = []

    class Damage(Heartbeat):
        def at(self, at, row):
            if at["step"] == 6:
                for shard in shards(tmp_path):
                    shard.write_bytes(bytes(shard.stat().st_size))

    trained, _ = train(run_of(), cache=cache_in(tmp_path, said), heartbeat=Damage(), sync_every_s=0.0)
    assert relative_difference(trained, uncached[0]) < 1e-5
    assert said
    assert all("damaged" in line for line in said)


class Images(decode.ImageStore):
    """Images that note where each batch begins, and end the process before one of them."""

    def batch(self, rows):
        self.asked.append(int(rows[0]))
        if len(self.asked) == self.last:
            raise KeyboardInterrupt
        return super().batch(rows)


def images_until(last=0):
    images = copy.copy(DATA.images)
    images.__class__, images.asked, images.last = Images, [], last
    return images


def test_a_fill_that_was_killed_goes_on_where_it_was(prefix, tmp_path):
    part, params, batch_stats = prefix

    def cache():
        files = disk.DiskCache(tmp_path / "files", 1 << 28, print, shard_bytes=16 * 2 * 4 * 4 * 6 * 4)
        return ActivationCache(0, files, fill_batch=8)

    first, second = images_until(5), images_until()
    with pytest.raises(KeyboardInterrupt):
        cache().get(part, params, batch_stats, first, "disk")
    assert not list(tmp_path.glob("files/*/entry.json"))
    found = cache().get(part, params, batch_stats, second, "disk")
    assert (first.asked, second.asked) == ([0, 8, 16, 24, 32], [32])
    assert not found.reused
    # Some processors round the same image differently in batches of another size.
    whole = ActivationCache(1 << 28, None, fill_batch=8).get(part, params, batch_stats, DATA.images)
    for view in range(2):
        np.testing.assert_array_equal(found.rows(view, np.arange(40)), whole.x[view])


@pytest.mark.parametrize("caching", [Caching("on"), ON_DISK], ids=["memory", "disk"])
@pytest.mark.parametrize("entry", [1, 2])
def test_what_a_fill_has_cost_is_in_the_ledger_before_anything_can_be_killed(tmp_path, caching, entry):
    """Entered as soon as the activations are computed, and once more when all of them are there."""
    quiet = train(run_of(caching), cache=cache_in(tmp_path / "quiet", memory=1 << 28))[1]
    folder = tmp_path / "killed"
    ledger = KillingLedger(folder / "ledger.jsonl", entry)
    with pytest.raises(KilledError):
        train(run_of(caching), folder, cache=cache_in(folder / "cache", memory=1 << 28), ledger=ledger)
    (row,) = ledger.rows()
    assert (row.cached, row.steps, row.images) == ("filled", 0, 0)
    assert row.model_flops == run_of(caching).fill_flops(0)
    assert row.cache_s + row.compile_s > 0
    spent = row.wall_s
    _, (row,) = train(run_of(caching), folder, cache=cache_in(folder / "cache", memory=1 << 28))
    assert counts([row]) == counts(quiet)
    assert row.wall_s > spent


@pytest.mark.long
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_the_skips_of_a_segmentation_network_are_part_of_what_is_kept(tier, tmp_path):
    model = Segmenter(ENCODER, 2)
    params, batch_stats = model.init(0)
    rows = np.asarray([5, 0, 39, 7])
    whole = jax.jit(model.__call__)(params, batch_stats, DATA.images.batch(rows))
    suffix = jax.jit(model.suffix, static_argnums=3)
    inside, behind = 2, model.groups.index("head")
    for boundary in (inside, len(ENCODER.groups), behind):
        found = cache_in(tmp_path, memory=1 << 28).get(
            Prefix(model, boundary), params, batch_stats, DATA.images, tier
        )
        assert bool(found.rows(0, rows)["skips"]) == (boundary != behind)
        logits, _ = suffix(params, batch_stats, found.rows(0, rows), boundary)
        np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)


def test_a_cut_encoder_and_a_whole_one_do_not_share_an_entry_where_one_of_them_pools(tmp_path):
    cache = cache_in(tmp_path, memory=1 << 28)
    whole, cut = Classifier(ENCODER, 1), Classifier(ENCODER.truncate("stage2/block1"), 1)
    # Initial weights follow from seed and path alone: the two have the same below the cut.
    one, other = (cache.get(Prefix(model, 2), *model.init(0), DATA.images) for model in (whole, cut))
    assert (one.x.shape, other.x.shape) == ((1, 40, 4, 4, 6), (1, 40, 6))


def test_what_a_later_phase_trains_on_is_computed_on_the_way_up_and_paid_for_once():
    head = Phase("head", 3, ("head",), 1e-2, augment=False)
    phases = [
        head,
        Phase("last", 2, ("stage3", "head"), 1e-2, augment=False),
        Phase("again", 2, ("stage3", "head"), 1e-3, augment=False),
        Phase("head again", 2, ("head",), 1e-3, augment=False),
    ]
    run = tiny.make_run(phases, encoder=ENCODER, data=DATA, cache="on")
    up_to = {
        boundary: accounting.forward(run.programs[0].model, 16, boundary).model * len(DATA)
        for boundary in (2, 3)
    }
    # The head's features go by way of stage 2; the third phase finds what the second read; the fourth starts
    # from there.
    assert [run.fill_flops(number) for number in range(4)] == [up_to[3], 0, 0, up_to[3] - up_to[2]]
    assert [[prefix.boundary for prefix, _ in run.prefixes_to_compute(number)] for number in range(4)] == [
        [2, 3],
        [2],
        [2],
        [2, 3],
    ]
    trained, rows = train(run)
    assert [row.cached for row in rows] == ["filled", "reused", "reused", "filled"]
    assert [row.reused_flops for row in rows] == [0] * 4
    alone, uncached = train(dataclasses.replace(run, caching=Caching("off")))
    assert relative_difference(alone, trained) < 1e-5
    for planned, row, plain in zip(plan.of_run(run), rows, uncached, strict=True):
        assert planned.flops == row.model_flops
        assert plain.model_flops > row.model_flops
    tight = dataclasses.replace(run, caching=Caching("on", memory_bytes=40 * 4 * 4 * 6 * 4, disk_bytes=0))
    assert [prefix.boundary for prefix, _ in tight.prefixes_to_compute(0)] == [3]  # both would not fit


def test_an_entry_belongs_to_its_weights_images_and_transform(prefix, tmp_path):
    part, params, batch_stats = prefix
    cache = cache_in(tmp_path)
    cache.get(part, params, batch_stats, DATA.images, "disk")
    head = {**params, "head": jax.tree.map(lambda leaf: leaf + 1, params["head"])}
    above = {**params, "stage3": jax.tree.map(lambda leaf: leaf + 1, params["stage3"])}
    below = {**params, "stage1": jax.tree.map(lambda leaf: leaf + 1, params["stage1"])}
    other = tiny.dataset(seed=3)
    assert cache.get(part, head, batch_stats, DATA.images, "disk").reused
    assert cache.get(part, above, batch_stats, DATA.images, "disk").reused
    assert not cache.get(part, below, batch_stats, DATA.images, "disk").reused
    assert not cache.get(part, params, batch_stats, other.images, "disk").reused
    assert not cache.get(part.plain, params, batch_stats, DATA.images, "disk").reused
    relabelled = tiny.dataset()
    relabelled.labels[:] = 0
    assert cache.get(part, params, batch_stats, relabelled.images, "disk").reused


def test_the_budget_on_disk_is_kept_by_dropping_what_was_used_longest_ago(prefix, tmp_path):
    part, params, batch_stats = prefix
    size = 2 * 40 * 4 * 4 * 6 * 4
    said = []
    cache = cache_in(tmp_path, said, disk=int(3.9 * size))

    def get(number):
        weights = jax.tree.map(lambda leaf: leaf + number, params)
        return cache.get(part, weights, batch_stats, DATA.images, "disk")

    for number in range(5):
        assert not get(number).reused
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert used < 3.9 * size
    assert get(4).reused
    assert not get(0).reused
    assert not said


def test_without_room_or_permission_training_goes_on_and_one_line_says_so(tmp_path, uncached, monkeypatch):
    (tmp_path / "file").write_text("")
    said = []
    trained, rows = train(run_of(), cache=cache_in(tmp_path / "file", said))
    assert same(trained, uncached[0])
    assert rows[0].cached == "off"
    assert rows[0].model_flops == uncached[1][0].model_flops
    assert len(said) == 1
    assert "cannot be written to" in said[0]

    full, said = tmp_path / "full", []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    _, rows = train(run_of(), cache=cache_in(full, said))
    assert rows[0].cached == "off"
    assert len(said) == 1
    assert "are free" in said[0]
    assert not list(full.glob("*.partial"))


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(prefix, tmp_path, monkeypatch):
    part, params, batch_stats = prefix
    said = []

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "_create", full)
    assert cache_in(tmp_path, said).get(part, params, batch_stats, DATA.images, "disk") is None
    assert len(said) == 1
    assert "No space left" in said[0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


# ---- bytes against FLOPs
# ------------------------------------------------------------------------------------------


def decision(phase=PARTIAL, **settings):
    program = run_of(Caching(), phase).programs[0]
    return choose_cache(program, len(DATA), DATA.images.size, Caching(**settings))


def test_processes_ask_one_another_alike_whatever_each_has_found(prefix, tmp_path, monkeypatch):
    """One whose disk has the entry and one whose disk has not come to the same collectives in the same order."""
    asked = []
    monkeypatch.setattr(
        processes, "all_reduce_max", lambda *values: asked.append(len(values)) or tuple(map(int, values))
    )
    for tier in ("memory", "disk"):
        calls = []
        for start in ("without", "with"):
            folder = tmp_path / tier
            if start == "with":
                cache_in(folder).get(*prefix, DATA.images, "disk")
            asked.clear()
            found = cache_in(folder, memory=1 << 28).get(*prefix, DATA.images, tier)
            assert found.reused == (start == "with")
            calls.append(list(asked))
        assert calls[0] == calls[1] != []


def test_memory_is_chosen_while_it_suffices_then_disk_where_a_byte_saves_enough():
    size = 2 * 40 * 4 * 4 * 6 * 4
    at_home = decision(memory_bytes=size)
    assert (at_home.tier, at_home.bytes) == ("memory", size)
    assert decision(memory_bytes=size - 1, flops_per_byte=1).tier == "disk"
    dear = decision(memory_bytes=size - 1, flops_per_byte=1e9)
    assert dear.tier == ""
    assert "a byte from disk saves" in dear.reason
    assert decision(memory_bytes=0, disk_bytes=0).tier == ""
    assert decision(memory_bytes=size // 2, dtype="bfloat16").tier == "memory"
    assert "saves" in at_home.reason


def test_what_cannot_be_cached_is_said_and_refused_on_request():
    fresh = Phase("partial", 3, ("stage3", "head"), 1e-2)
    assert "views=K" in decision(fresh).reason
    with pytest.raises(UserError, match=r"cache.mode=on, but images are augmented anew"):
        decision(fresh, mode="on")
    with pytest.raises(UserError, match=r"exceed the budgets"):
        decision(mode="on", memory_bytes=0, disk_bytes=0)
    assert decision(Phase("few", 2, ("stage3", "head"), 1e-2, views=2)).tier == ""
    assert policy.choose_cache(run_of(Caching(), tiny.FULL).programs[0], 40, 16, Caching("on")).tier == ""


def test_two_studies_on_one_cache_folder_evict_each_others_entries_and_read_nothing_but_their_own(tmp_path):
    """A shard that is gone is an error: it would read as zeros, and the study go on with them."""
    shape, images, failed = jax.ShapeDtypeStruct((4, 4, 8), np.float32), 8, []

    def values(key):
        return np.full((1, images, 4, 4, 8), int(key), np.float32)

    def study(keys):
        files = disk.DiskCache(tmp_path, int(2.5 * values(0).nbytes), lambda line: None)
        try:
            for key in keys * 10:

                def fill(key=key):
                    made = [values(key)]
                    return files.find(key) or files.fill(key, shape, 1, images, lambda _: iter(made), {})

                reader = disk.SelfHealingReader(fill(), fill, lambda line: None)
                for row in range(images):
                    (found,) = reader.read(0, np.asarray([row]))
                    assert (found == int(key)).all()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=study, args=(keys,)) for keys in (["1", "2"], ["3", "4"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_shard_removed_under_an_open_entry_is_an_error_and_computed_again(tmp_path):
    shape, found = jax.ShapeDtypeStruct((3,), np.float32), np.ones((1, 4, 3), np.float32)
    files, said = disk.DiskCache(tmp_path, 1 << 20, print), []

    def fill():
        return files.find("key") or files.fill("key", shape, 1, 4, lambda _: iter([found]), {})

    reader = disk.SelfHealingReader(fill(), fill, said.append)
    files.drop("key")
    np.testing.assert_array_equal(reader.read(0, np.arange(4))[0], found[0])
    assert "damaged" in said[0]
