"Runs that are killed, interrupted or given a bad place to write."
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch

from curve_reweight.core import make_out_dir, save_checkpoint

small = ('--method curvenet_gdw --epochs 3 --probe_epochs 5 --drop_epochs 1 --batch_size 64 --wave_batch_size 32 '
         '--checkpoint_seconds 0 --follow_samples 5').split()
processes = multiprocessing.get_context('forkserver')  # a server that has imported everything, so that each process starts at once
processes.set_forkserver_preload(['curve_reweight.experiment'])


def command(log, words):
    "What `python -m curve_reweight` does, its words in a file"
    from curve_reweight.experiment import main
    for stream in 1, 2: os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
    sys.argv = ['curve_reweight', *words]
    main()


def start(out, *words, common=small):
    "The command, as a process; what it says goes to a file beside the folder"
    process = processes.Process(target=command, args=(f'{out}.log', [*common, *words, '--out_dir', str(out)]))
    open(f'{out}.log', 'w').close()
    process.start()
    return process


def end(process, out, seconds=300):
    "Exit code and words of a process that ends by itself"
    process.join(seconds)
    with open(f'{out}.log') as f: return process.exitcode, f.read()


def kill(process): process.kill(); process.join(); return process.exitcode


def row(out): return {k: v for k, v in json.loads((out/'row.json').read_text()).items() if not k.startswith('seconds') and k != 'out_dir'}


def finish(out, *words, common=small):
    code, said = end(start(out, *words, common=common), out)
    assert code == 0 and 'Traceback' not in said, said
    return row(out)


def wait_for(condition, process, seconds=60):
    "Wait until something is true, or the process has ended"
    until = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < until: time.sleep(.01)


def saved(out):
    "Checkpoints and when they were written; one that is just being renamed is left out"
    found = {}
    for path in out.glob('*.pt'):
        try: found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError: pass
    return found


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nobody disturbs"
    out = tmp_path_factory.mktemp('whole')
    return finish(out), out


def test_killed_at_20_random_moments_ends_in_the_same_row(whole, tmp_path):
    expected, undisturbed = whole
    draw, kills = random.Random(0), 0
    for moment in range(20):  # each process gets a little further than the one before
        before = saved(tmp_path)
        process = start(tmp_path)
        wait_for(lambda: saved(tmp_path) != before, process)  # it has gone on from there
        time.sleep(draw.random()*.05)  # a save takes about as long as a step here, so half of the kills hit one
        kills += kill(process) == -signal.SIGKILL
    assert kills == 20, 'the run was over before the last kill: make it longer'
    assert finish(tmp_path) == expected
    for name in 'history.csv', 'suspects.csv', 'followed.npz': assert (tmp_path/name).read_bytes() == (undisturbed/name).read_bytes()
    assert not list(tmp_path.glob('*.pt')) and not list(tmp_path.glob('*.part')) and not (tmp_path/'probe_losses.f32').exists()


few = '--dataset digits --model small_cnn --epochs 4 --batch_size 64 --checkpoint_seconds 0'.split()
staged = {'forward': '', 's_model': '', 'lccn': '', 'joint_optimization': '--average_epochs 2',
          'd2l': '--lid_window 1 --lid_start 1 --lid_samples 30 --lid_neighbours 5'}


@pytest.mark.slow
@pytest.mark.parametrize('method', staged)
def test_killed_in_any_stage_ends_in_the_same_row(method, tmp_path):
    words = ['--method', method, *staged[method].split()]
    expected = finish(tmp_path/'whole', *words, common=few)
    for kills in range(6):
        before = saved(tmp_path/'killed')
        process = start(tmp_path/'killed', *words, common=few)
        wait_for(lambda: saved(tmp_path/'killed') != before, process)
        time.sleep(.1*kills)
        kill(process)
        if (tmp_path/'killed'/'row.json').exists(): break
    assert kills > 1 and finish(tmp_path/'killed', *words, common=few) == expected
    assert not list((tmp_path/'killed').glob('*.pt'))


def test_ctrl_c_leaves_a_checkpoint(whole, tmp_path):
    process = start(tmp_path, '--checkpoint_seconds', '60')
    wait_for(lambda: (tmp_path/'probe_losses.f32').exists(), process)
    os.kill(process.pid, signal.SIGINT)
    code, said = end(process, tmp_path)
    assert code == 130 and 'Traceback' not in said and 'same command' in said, said
    assert list(tmp_path.glob('*.pt')) and not (tmp_path/'row.json').exists()
    assert finish(tmp_path) == whole[0]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: (tmp_path/'train.previous.pt').exists(), process)
    kill(process)
    last = tmp_path/'train.pt'
    content = last.read_bytes() if last.exists() else (tmp_path/'train.previous.pt').read_bytes()
    last.write_bytes(content[:len(content)//2])
    code, said = end(start(tmp_path), tmp_path)
    assert code == 0 and 'train.pt' in said and 'damaged' in said, said
    assert row(tmp_path) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize('method, words', [
    ('mentornet', []), ('cleannet', ['--clean_net_steps', '20']), ('distill', []), ('posterior_labels', []),
    ('mlnt', ['--synthetic_batches', '1', '--rounds', '2'])])
def test_killed_in_the_last_of_several_trainings(method, words, tmp_path):
    words = ['--dataset', 'digits', '--model', 'small_cnn', '--method', method, '--epochs', '3', '--batch_size', '64',
             '--checkpoint_seconds', '0', *words]
    expected = finish(tmp_path/'whole', *words, common=[])
    process = start(tmp_path/'killed', *words, common=[])
    wait_for(lambda: (tmp_path/'killed'/'train.previous.pt').exists(), process)
    assert kill(process) == -signal.SIGKILL, 'the run was over before it could be killed'
    assert finish(tmp_path/'killed', *words, common=[]) == expected


def test_the_second_run_in_a_folder_stops(tmp_path):
    first = start(tmp_path, '--epochs', '1000')
    wait_for(lambda: (tmp_path/'.lock').exists() and (tmp_path/'.lock').read_text(), first)
    code, said = end(start(tmp_path), tmp_path)
    kill(first)
    assert code != 0 and f'is in use by process {first.pid}' in said and 'Traceback' not in said


def test_another_setting_does_not_go_on_from_a_checkpoint(tmp_path):
    process = start(tmp_path)
    wait_for(lambda: (tmp_path/'probe.pt').exists(), process)
    kill(process)
    code, said = end(start(tmp_path, '--lr', '0.01'), tmp_path)
    assert code != 0 and 'holds a checkpoint of another run' in said and 'Traceback' not in said


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='the superuser may write anywhere')
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match='cannot be written'): make_out_dir(tmp_path/'x')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {'step': 1})
    before = (tmp_path/'checkpoint.pt').read_bytes()
    import builtins
    real = builtins.open
    monkeypatch.setattr(builtins, 'open', lambda path, mode='r', *a, **k: real('/dev/full', mode.replace('x', 'w'), *a, **k)
                        if '.part' in str(path) and mode[0] in 'wx' else real(path, mode, *a, **k))
    with pytest.raises(OSError, match='[Nn]o space'): save_checkpoint(tmp_path, {'step': 2, 'x': torch.zeros(100_000)})
    monkeypatch.undo()
    assert (tmp_path/'checkpoint.pt').read_bytes() == before and [p.name for p in tmp_path.iterdir() if p.suffix != '.pt'] == []
