# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The CPU's kernels and their threads: the same bits however many, forks, workers, and a cache that cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from types import ModuleType

import pytest
import torch

pytest.importorskip("numba")

from monai_losses_ext.sums import Target, chunked, numba, pool, proof, terms, voxel_sums

NAMES = ["tp", "pred", "ref", "ce", "focal:2.0", "focal:0.5", "count"]


def batch(shape=(2, 3, 33, 40, 41)):
    return torch.randn(shape), torch.randint(0, shape[1], (shape[0], 1, *shape[2:]))


def loss(x, labels, backend="auto"):
    sums = voxel_sums(x, labels, NAMES, backend=backend)
    return sum((value.square() if term != "ce" else value).sum() / 1e4 for term, value in sums.items())


@pytest.mark.parametrize("backend", ["numba", "chunked"])
def test_the_same_bits_for_any_number_of_threads(backend):
    x, labels = batch()
    results = []
    for threads in (1, 2, 4, 2):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        sums = voxel_sums(leaf, labels, NAMES, backend=backend)
        results.append((torch.stack(list(sums.values())), torch.autograd.grad(sum(sums.values()).sum(), leaf)[0]))
        assert torch.get_num_threads() == threads
    for sums, gradient in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(gradient, results[0][1])


def test_chunks_leave_the_threads_of_torch_as_they_were():
    x, labels = batch((4, 2, 40, 40, 40))
    torch.set_num_threads(4)
    seen = []
    loss(x.requires_grad_(), labels, "chunked").backward()
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 4 and seen == [4]


@pytest.mark.parametrize("backend", ["numba", "chunked"])
def test_four_threads_at_once(backend):
    problems = [batch((1, 3, 20 + i, 30, 31)) for i in range(4)]
    expected = [loss(x, labels, "reference") for x, labels in problems]
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

    def work(i):
        for _ in range(5):
            found[i].append(loss(*problems[i], backend))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, values in found.items():
        assert len(values) == 5
        torch.testing.assert_close(torch.stack(values), expected[i].expand(5), rtol=1e-4, atol=1e-4)


def test_an_error_in_a_thread_is_raised_where_the_call_was_made_and_calls_may_be_nested():
    numbers, done = iter(range(100)), []

    def work():
        for i in numbers:
            pool.spread(lambda i=i: done.append(i), 2)
            if i == 50:
                raise KeyError(i)

    with pytest.raises(KeyError, match="50"):
        pool.spread(work, 3)
    assert set(range(50)) <= set(done)
    pool.spread(lambda: done.append("after"), 3)
    assert "after" in done


def run(code, **environment):
    """Run Python code in a fresh process and return what it printed and warned of."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_forks_workers_and_a_first_use_by_three_threads():
    """One process: three threads use the kernels first, children are forked, a DataLoader's workers compute too."""
    out, _ = run(
        """
        import os, threading, torch
        from monai_losses_ext.sums import voxel_sums

        torch.set_num_threads(2)
        x = torch.randn(2, 3, 64, 64, 32); y = torch.randint(0, 3, (2, 64, 64, 32))
        def value(backend="auto"):
            leaf = x.detach().requires_grad_()  # no operation of torch's own threads, which hang in a forked child
            sums = voxel_sums(leaf, y, ["tp", "ce"], backend=backend)
            (sums["tp"].sum() + sums["ce"].sum()).backward()
            return sums["ce"].sum().item(), float(abs(leaf.grad.numpy()).sum())

        found = []
        threads = [threading.Thread(target=lambda: found.append(value())) for _ in range(3)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert len(set(found)) == 1 and len(found) == 3, found
        right = found[0]
        class Losses(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): torch.set_num_threads(2); return torch.tensor(value(), dtype=torch.float64)

        for i in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if value() == right else 1)
            assert value() == right
            assert os.waitpid(child, 0)[1] == 0
        for row in torch.utils.data.DataLoader(Losses(), num_workers=2, batch_size=None):
            assert tuple(row.tolist()) == right
        print("alike")
        """
    )
    assert out.strip().endswith("alike")


def test_the_operator_compiles_whole_and_keeps_its_contract():
    x, labels = batch((2, 3, 9, 10, 11))
    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        leaf = x.clone().requires_grad_()
        value = function(leaf, labels)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[0], results[1])
    arguments = (x.requires_grad_(), labels, *[None] * 6, (), True, 0, "tp,pred,ce", "softmax", "numba")
    torch.library.opcheck(torch.ops.monai_losses_ext.voxel_sums.default, arguments)


def test_float64_goes_to_the_chunks(monkeypatch):
    x, labels = batch((1, 2, 40))
    monkeypatch.setattr(numba, "forward", None)
    assert voxel_sums(x.double(), labels, ["tp"])["tp"].dtype == torch.float64


def test_kernels_that_give_other_numbers_are_not_chosen():
    broken = ModuleType("monai_losses_ext.sums.broken")
    broken.forward = lambda *arguments: numba.forward(*arguments) * 1.001
    broken.backward = numba.backward
    with pytest.warns(
        RuntimeWarning, match=r"broken does not work here \(.*other numbers.*tp of softmax\); .*'chunked'"
    ):
        assert not proof.proven(broken, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not proof.proven(broken, "cpu")  # once
        assert proof.proven(numba, "cpu")


@pytest.mark.parametrize("wrong", ["gradient", "raises"])
def test_whatever_is_wrong_with_kernels_is_found(wrong):
    def backward(*arguments):
        if wrong == "raises":
            raise OSError("no compiler")
        return numba.backward(*arguments).flip(1)

    broken = ModuleType("monai_losses_ext.sums.broken")
    broken.forward, broken.backward = numba.forward, backward
    reason = "no compiler" if wrong == "raises" else "the gradient of softmax"
    with pytest.warns(RuntimeWarning, match=reason):
        assert not proof.proven(broken, "cpu")


def test_a_problem_for_the_proof_covers_every_term():
    covered = {terms.split(term)[0] for a in terms.ACTIVATIONS for term in proof._problem("cpu", a)[2]}
    assert covered == {*terms.PLAIN_TERMS, *terms.FOCAL_TERMS, *terms.REGION_TERMS, terms.BINS}


TINY = """
import importlib.util, resource, sys, types as python_types, warnings
import numpy as np
sys.path.insert(0, {folder!r})
import tiny
place = importlib.util.find_spec("monai_losses_ext").submodule_search_locations[0]
for name in ("", "/sums", "/sums/numba"):  # without what these import, which takes ten seconds
    package = python_types.ModuleType("monai_losses_ext" + name.replace("/", "."))
    package.__path__ = [place + name]
    sys.modules[package.__name__] = package
from numba import types
from monai_losses_ext.sums.numba import compiled
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kernel = compiled.build(tiny.double, types.void(types.float64[::1]))
x = np.ones(3); kernel(x)
print(x.tolist(), [str(w.message) for w in caught if "voxel_sums" in str(w.message)], len(caught))
"""


def tiny(tmp_path, before="", **environment):
    """Compile a function of a file of its own as the kernels are compiled; return its result and the warnings."""
    (tmp_path / "tiny.py").write_text("def double(x):\n    for i in range(x.size):\n        x[i] *= 2\n")
    os.utime(tmp_path / "tiny.py", (1, 1))
    return run(TINY.format(folder=str(tmp_path), before=before), **environment)[0].strip()


def test_no_place_for_a_cache_is_one_warning(tmp_path):
    (tmp_path / "__pycache__").touch()  # a file: nobody, not even root, can make the folder
    out = tiny(tmp_path, NUMBA_CACHE_DIR="/dev/null/none", HOME="/dev/null/none")
    assert out.startswith("[2.0, 2.0, 2.0]") and "the compiled CPU kernels cannot be kept or read (" in out
    assert out.endswith("1")


def test_a_cache_is_used_and_a_torn_file_in_it_is_one_warning(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    assert tiny(tmp_path, NUMBA_CACHE_DIR=str(cache)) == "[2.0, 2.0, 2.0] [] 0"
    files = [path for path in cache.rglob("*.nb*") if path.is_file()]
    assert len(files) == 2
    assert tiny(tmp_path, NUMBA_CACHE_DIR=str(cache)) == "[2.0, 2.0, 2.0] [] 0"
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        out = tiny(tmp_path, NUMBA_CACHE_DIR=str(cache))
        assert out.startswith("[2.0, 2.0, 2.0] ['voxel_sums: the compiled CPU kernels cannot"), path
        path.write_bytes(whole)


def test_a_full_disk_is_one_warning(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    out = tiny(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))", NUMBA_CACHE_DIR=str(cache))
    assert out.startswith("[2.0, 2.0, 2.0] ['voxel_sums: the compiled CPU kernels cannot be kept or read")


def test_a_cache_in_a_folder_that_became_read_only(tmp_path):
    """Written by an administrator, read by users: no error, and no more than one warning."""
    cache = tmp_path / "cache"
    cache.mkdir()
    tiny(tmp_path, NUMBA_CACHE_DIR=str(cache))
    folders = [path for path in cache.rglob("*") if path.is_dir()]
    before = "import tempfile\ndef refuse(*a, **k): raise PermissionError('read-only')\ntempfile.TemporaryFile = refuse"
    for folder in folders:
        folder.chmod(0o555)
    out = tiny(tmp_path, before, NUMBA_CACHE_DIR=str(cache), HOME="/dev/null/none")
    assert out.startswith("[2.0, 2.0, 2.0]")
    for folder in folders:
        folder.chmod(0o755)


def test_what_does_not_fit_in_the_kernels_is_declined():
    x, labels = batch((1, 3, 8))
    target = Target(labels, True)
    assert numba.supports(x, target, ["tp"], "softmax")
    assert not numba.supports(x.double(), target, ["tp"], "softmax")
    assert not numba.supports(x, target, ["tp", "pred_cubed"], "softmax")
    assert not numba.supports(x, Target(labels, True, ignored=(2**40,)), ["tp"], "softmax")
    value = voxel_sums(x, labels, ["tp"], ignore_index=2**40)["tp"]
    torch.testing.assert_close(value, chunked.forward(x, target, ["tp"], "softmax")[0])


def test_what_the_work_holds_is_let_go_of_by_the_thread_that_asked_for_it():
    """A late thread of the pool freed tensors while Python ended, which aborted the process."""

    class Held:
        pass

    for _ in range(300):
        held = Held()
        gone = weakref.ref(held)
        pool.spread(lambda _held=held: None, 3)
        del held
        assert gone() is None
