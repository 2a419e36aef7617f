"""Files and folders that are replaced whole: by several writers at once, on a full disk, and after a kill."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from saw_trtllm import files
from saw_trtllm.files import replacing_file, replacing_folder

OWNED = ("config.json", "rank*.engine", "tokenizer.json")
#: Writes a folder whose files all hold one word, and stops at a place to be killed there.
WRITER = """
import sys, time
from pathlib import Path
from saw_trtllm import files
folder, word, stop = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def here(*args, **options):
    print("here", flush=True)
    time.sleep(60)

if stop == "exchanged":
    files.shutil.rmtree = here
elif stop == "exchanging":
    files._exchange = here
for _ in range(int(sys.argv[4])):
    with files.replacing_folder(folder, {owned}) as part:
        for name in ("rank0.engine", "rank1.engine", "config.json"):
            (part / name).write_text(word)
            if stop == name:
                here()
""".replace("{owned}", repr(OWNED))


def write(folder, word, names=("config.json", "rank0.engine", "rank1.engine")):
    with replacing_folder(folder, OWNED) as part:
        for name in names:
            (part / name).write_text(word)


def read(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


def whole(word):
    return dict.fromkeys(("config.json", "rank0.engine", "rank1.engine"), word)


def start(folder, word, stop="", times=1):
    command = [sys.executable, "-c", WRITER, str(folder), word, stop, str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_is_owned_is_replaced_and_all_else_stays(tmp_path):
    folder = tmp_path / "engine"
    write(folder, "old", ("config.json", "rank0.engine", "rank1.engine", "tokenizer.json"))
    (folder / "repository" / "1").mkdir(parents=True)
    (folder / "repository" / "1" / "model.py").write_text("code")
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    folder.chmod(0o750)
    write(folder, "new", ("config.json", "rank0.engine"))
    assert read(folder) == {"config.json": "new", "rank0.engine": "new", "notes.txt": "mine", "link": "mine"}
    assert (folder / "repository" / "1" / "model.py").read_text() == "code"
    assert (folder / "link").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == whole("new")


@pytest.mark.parametrize("why", ["current directory", "mount point", "no exchange"])
def test_a_folder_that_cannot_be_exchanged_keeps_its_place(why, tmp_path, monkeypatch):
    folder = tmp_path / "engine"
    write(folder, "old")
    (folder / "notes.txt").write_text("mine")
    inode = folder.stat().st_ino
    if why == "current directory":
        monkeypatch.chdir(folder)
    elif why == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    else:
        monkeypatch.setattr(files, "_exchange", lambda *args: False)
    write(folder, "new", ("config.json", "rank0.engine"))
    assert read(folder) == {"config.json": "new", "rank0.engine": "new", "notes.txt": "mine"}
    assert folder.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder, file = tmp_path / "engine", tmp_path / "calib"
    write(folder, "old")
    file.write_text("old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # A file system that allocates late says so only when the bytes are to be on the disk.
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(folder, "new")
    with pytest.raises(OSError, match="No space left"), replacing_file(file) as f:
        f.write(b"new")
    assert read(folder) == whole("old")
    assert file.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"engine", "calib"}


@pytest.mark.parametrize(
    ("stop", "left"),
    [("rank0.engine", "old"), ("config.json", "old"), ("exchanging", "old"), ("exchanged", "killed")],
)
def test_a_killed_writer_leaves_one_or_the_other(stop, left, tmp_path):
    folder = tmp_path / "engine"
    write(folder, "old")
    (folder / "notes.txt").write_text("mine")
    writer = start(folder, "killed", stop)
    assert writer.stdout.readline() == "here\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert read(folder) == whole(left) | {"notes.txt": "mine"}
    assert len(list(tmp_path.iterdir())) == 2
    write(folder, "new")
    assert read(folder) == whole("new") | {"notes.txt": "mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_writers_at_once_leave_the_whole_of_one(tmp_path):
    """What a reader finds through an open folder is of one writer at any moment."""
    folder = tmp_path / "engine"
    write(folder, "0")
    writers = [start(folder, word, times=6) for word in "123"]
    seen, deadline = set(), time.monotonic() + 120
    while any(w.poll() is None for w in writers) and time.monotonic() < deadline:
        descriptor = os.open(folder, os.O_RDONLY)
        names = ("config.json", "rank0.engine", "rank1.engine")
        try:
            opened = [os.open(name, os.O_RDONLY, dir_fd=descriptor) for name in names]
        except FileNotFoundError:  # replaced and removed since it was opened
            continue
        finally:
            os.close(descriptor)
        words = {os.read(file, 9) for file in opened}
        for file in opened:
            os.close(file)
        assert len(words) == 1
        seen |= words
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    for w in writers:
        w.stdout.close()
    assert len(seen) > 1
    assert len(set(read(folder).values())) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_living_writers_part_is_left_alone(tmp_path):
    file = tmp_path / "calib"
    with replacing_file(file) as first:
        first.write(b"first")
        with replacing_file(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_a_large_file_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 4)
    data = bytes(range(11))
    synced = []
    monkeypatch.setattr(files.os, "fdatasync", lambda descriptor: synced.append(descriptor))
    with files.writing_large(tmp_path / "file") as write:
        write(data[:3])
        write(memoryview(data)[3:])
        assert (tmp_path / "file").read_bytes() == data  # it may be read before the disk has it
    assert len(synced) == 3
