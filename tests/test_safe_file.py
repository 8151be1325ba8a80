"""Files of strangers, accidents while writing, and what plain data is."""

import hashlib
import io
import os
import pickle
import resource
import stat
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pyro_ssvi.plain_data import Maybe, check_form, plain
from pyro_ssvi.safe_file import Format

FILES = Format("pyro_ssvi test", 1, "a test's")
STATE = {"version": 1, "numbers": torch.arange(7.0), "names": ["a", ("b", 1)], "none": None}


@pytest.fixture
def path(tmp_path):
    FILES.write(tmp_path / "a", STATE)
    return tmp_path / "a"


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def refuses(path, payload, match):
    """A file with this content and a right checksum."""
    digest = hashlib.sha256(payload).hexdigest()
    path.write_bytes(f"pyro_ssvi test 1 sha256 {digest}\n".encode() + payload)
    with pytest.raises(ValueError, match=match) as error:
        FILES.read(path)
    assert str(path) in str(error.value)


def test_every_byte_counts(path):
    content = path.read_bytes()
    assert FILES.read(path).keys() == STATE.keys()
    for i in [*range(120), *range(120, len(content), 97)]:
        for bit in (0, 5):
            flipped = bytearray(content)
            flipped[i] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"is not a|newer"):
                FILES.read(path)
    for end in range(0, len(content), 64):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="is not a"):
            FILES.read(path)


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "state", [Harm(), {"version": 1, "a": [{"b": (Harm(),)}]}, {"version": 1, Harm(): 1}]
)
def test_no_code_runs_wherever_it_is(path, monkeypatch, tmp_path, state, new):
    monkeypatch.chdir(tmp_path)
    payload = saved(state, _use_new_zipfile_serialization=new)
    refuses(path, payload, "more than numbers, strings and tensors" if new else "not a zip file")
    refuses(path, pickle.dumps(state), "not a zip file")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("value", [{1, 2}, torch.float32, b"x", 1j, torch.Size([2])], ids=repr)
def test_what_is_not_plain(path, value):
    refuses(
        path, saved({"version": 1, "a": [value]}), f"it holds a {type(value).__name__}|more than"
    )


@pytest.mark.parametrize("state", [[1], 1, torch.zeros(2), {"a": 1}, {"version": 2}], ids=repr)
def test_the_version_inside(path, state):
    refuses(path, saved(state), "not of the version")


def add(name, content=b"x", **options):
    def change(archive):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's own, of names that are there
            archive.writestr(name, content, **options)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (add("../../evil"), "no archive of torch.save"),
        (add("a/../../evil"), "no archive of torch.save"),
        (add("a/constants.pkl"), "no archive of torch.save"),
        (add("a/code/__torch__.py"), "no archive of torch.save"),
        (add("b/data.pkl"), "no archive of torch.save"),
        (add("a/data.pkl", pickle.dumps(Harm())), "two members of one name"),
        (add("a/data/0", b"\1" * 28), "two members of one name"),
        (add("a/data/1", bytes(10**6), compress_type=zipfile.ZIP_DEFLATED), "compressed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_torch_did_not_write(path, change, match):
    content = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(STATE))) as source,
        zipfile.ZipFile(content, "w") as archive,
    ):
        for name in source.namelist():
            archive.writestr("a/" + name.split("/", 1)[1], source.read(name))
        change(archive)
    refuses(path, content.getvalue(), match)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_an_archive_with_something_around_it(path, place):
    payload = saved(STATE)
    refuses(path, b"x" + payload if place == "before" else payload + b"x", "more than an archive")


def test_numbers_that_are_not_there(path):
    """One number, repeated without end; and a tensor larger than what the file has for it."""
    state = {"version": 1, "a": torch.zeros(1).expand(2**40)}
    refuses(path, saved(state), "has no numbers for all of it")
    refuses(path, saved({"version": 1, "a": torch.zeros(3, device="meta")}), "is not dense")
    payload = saved({"version": 1, "a": torch.arange(7.0)})
    assert payload.count(b"K\x07\x85") == 1  # its shape, (7,)
    refuses(
        path,
        payload.replace(b"K\x07\x85", b"K\xff\x85"),
        "without numbers|not resizable|is damaged",
    )


def test_few_bytes_that_stand_for_many(path):
    loop = {"version": 1}
    loop["a"] = [loop]
    refuses(path, saved(loop), "holds itself")
    laughs = [1]
    for _ in range(40):
        laughs = [laughs] * 10
    refuses(path, saved({"version": 1, "a": laughs}), "again and again")
    deep = []
    for _ in range(200):
        deep = [deep]
    refuses(path, saved({"version": 1, "a": deep}), "holds itself, or the same")


class Own(torch.Tensor):
    pass


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.complex64(1j), r"the state\['a'\] is a complex: a checkpoint takes"),
        (np.bytes_(b"x"), "is a bytes"),
        ({object(): 1}, r"a key of the state\['a'\] is a object"),
        ({(1, 2j): 1}, r"a key of the state\['a'\]\[1\] is a complex"),
        (nested(99), "nested too deeply"),
        (nested(5000), "nested too deeply"),
        (torch.zeros(3, device="meta"), r"the state\['a'\] is not dense"),
        (torch.zeros(3).as_subclass(Own), "is a Own"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_is_not_saved(value, match):
    with pytest.raises((TypeError, ValueError), match=match):
        plain({"version": 1, "a": value}, "the state")


@pytest.mark.parametrize(
    "value",
    [
        {np.str_("a"): np.float64(1.5), np.int64(3): [np.bool_(True)], (1, "b"): None},
        nested(85),
        [torch.zeros(1).expand(1000), torch.ones(2) > 0],
    ],
    ids=["numpy", "deep", "tensors"],
)
def test_what_is_saved_can_be_loaded(path, value):
    state = plain({"version": 1, "a": value}, "the state")
    FILES.write(path, {"version": 1, "members": [state]})  # as in an ensemble's file
    assert str(FILES.read(path)["members"][0]) == str(state)


def test_another_kind_of_file_is_not_read_whole():
    with pytest.raises(ValueError, match="/dev/zero is not a pyro_ssvi test: expected a test's"):
        FILES.read("/dev/zero")


# Where to write


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    FILES.write(link, {**STATE, "none": 3})
    assert link.is_symlink()
    assert FILES.read(path)["none"] == 3
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]


def test_a_link_in_the_place_of_the_part_is_not_followed(path, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.part").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        FILES.write(path, STATE)
    assert (tmp_path / "victim").read_text() == "precious"


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/null"):
        with pytest.raises(OSError, match="is not a file"):
            FILES.write(path, STATE)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.listdir(tmp_path) == ["fifo"]
    with pytest.raises(FileNotFoundError):
        FILES.write(tmp_path / "none" / "a", STATE)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, tmp_path):
    """A limit on the size of files."""
    content = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            FILES.write(path, {**STATE, "numbers": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a"]


def test_another_takes_the_file_away_while_one_waits_for_it(path, monkeypatch):
    calls, real = [], os.stat

    def gone_at_first(name, *args, **kwargs):
        if str(name).endswith(".part") and not calls:
            calls.append(name)
            raise FileNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "stat", gone_at_first)
    FILES.write(path, {"version": 1, "n": 2})
    assert calls
    assert FILES.read(path)["n"] == 2


def test_a_file_system_that_tells_other_numbers_each_time(path, monkeypatch):
    calls, real = [], os.stat

    def another(name, *args, **kwargs):
        if not str(name).endswith(".part"):
            return real(name, *args, **kwargs)
        calls.append(name)
        assert len(calls) < 1000
        return real("/")

    monkeypatch.setattr(os, "stat", another)
    with pytest.raises(OSError, match=r"a\.part is another file each time"):
        FILES.write(path, STATE)
    monkeypatch.undo()
    assert FILES.read(path).keys() == STATE.keys()


def test_several_that_write_to_one_path_at_once(path, tmp_path):
    """Each file is whole, whoever wrote it, and no writing fails. Locks are of open files."""
    states = [{"version": 1, "a": torch.full((50_000 * (i + 1),), float(i))} for i in range(3)]

    def write(state):
        for _ in range(15):
            FILES.write(path, state)

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, state) for state in states]
        while not all(writer.done() for writer in writers):
            numbers = FILES.read(path).get("a", torch.zeros(50_000))
            assert len(numbers) == 50_000 * (numbers[0] + 1)
            assert (numbers == numbers[0]).all()
    assert [writer.result() for writer in writers] == [None] * 3
    assert os.listdir(tmp_path) == ["a"]


# Forms


FORM = {"a": int, "b": Maybe([float]), "c": {str: {"d": (str, type(None))}}}


def test_forms():
    check_form({"a": 1, "c": {}}, FORM)
    check_form({"a": 1, "b": (0.5,), "c": {"x": {"d": None, "more": 1}}, "more": 2}, FORM)
    for value, match in (
        (None, "it is a NoneType, expected Mapping"),
        ({"c": {}}, "it has no 'a'"),
        ({"a": True, "c": {}}, r"\['a'\] is a bool, expected int"),
        ({"a": 1, "b": [0.5, 1], "c": {}}, r"\['b'\]\[1\] is a int, expected float"),
        ({"a": 1, "b": None, "c": {}}, r"\['b'\] is a NoneType, expected list or tuple"),
        ({"a": 1, "c": {3: {}}}, r"a key of \['c'\] is a int, expected str"),
        ({"a": 1, "c": {"x": {"d": 1}}}, r"\['c'\]\['x'\]\['d'\] is a int, expected str or NoneT"),
    ):
        with pytest.raises(ValueError, match=match):
            check_form(value, FORM)
