"""Data sets of the hub, with a stand-in for the library that gives rows without a network."""

import itertools
import sys
import types
import urllib.error
import urllib.request

import pytest

from budwood.data import hub
from budwood.data.hub import HubRows
from budwood.data.sources import read
from budwood.errors import UsageError


@pytest.fixture
def asked(monkeypatch):
    """Calls made to the library and rows taken from it; it has an endless set of texts of ten characters."""
    calls, taken = [], []

    def load_dataset(repo, config, data_files, split, streaming):
        calls.append((repo, config, split, streaming))
        if repo == "no/such":
            raise FileNotFoundError("no/such is not on the hub")
        if config == "wikitext-2-raw-v1":
            return iter([{"text": row} for row in ("", " = a = \n", "", " b \n")])
        return ({"text": f"{taken.append(number) or number:010}", "url": "u"} for number in itertools.count())

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub, "require_network", lambda name: None)
    return types.SimpleNamespace(calls=calls, taken=taken)


def test_only_what_is_needed_is_fetched(asked):
    texts = read("c4", "calibration", characters=95)
    assert len(texts.documents) == len(asked.taken) == 10
    assert asked.calls == [("allenai/c4", None, "train", True)]


def test_c4_has_a_default_amount_for_evaluation(asked):
    assert len(read("c4", "evaluation").documents) == 1100
    assert asked.calls[0][2] == "validation"


@pytest.mark.parametrize(("purpose", "split"), [("calibration", "train"), ("evaluation", "test")])
def test_wikitext2_is_the_file_its_rows_were_cut_from(asked, purpose, split):
    texts = read("wikitext2", purpose)
    assert asked.calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", split, True)]
    assert texts.documents == (" \n = a = \n \n b \n",)
    assert texts.rows() == ["", " = a = \n", "", " b \n"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("hf:a/b:train", HubRows("a/b", "train")),
        ("hf:a/b:de:train", HubRows("a/b", "train", "de")),
        ("hf:a/b:de:train:body", HubRows("a/b", "train", "de", "body")),
        ("hf:a/b::train:body", HubRows("a/b", "train", None, "body")),
        ("hf:a/b", None),
        ("hf::train", None),
        ("hf:a/b:c:d:e:f", None),
    ],
)
def test_names_of_the_hub_are_parsed_or_refused(name, rows):
    if rows is not None:
        assert HubRows.parse(name) == rows
    else:
        with pytest.raises(UsageError, match="hf:REPO"):
            HubRows.parse(name)


def test_a_field_is_chosen_by_name(asked):
    assert read("hf:a/b::train:url", "calibration", characters=2).documents == ("u", "u")
    with pytest.raises(UsageError, match="no text in the field 'body'"):
        read("hf:a/b::train:body", "calibration", characters=2)


def test_an_error_of_the_hub_names_local_data(asked):
    with pytest.raises(UsageError, match="no/such is not on the hub; local data work without it"):
        read("hf:no/such:train", "calibration")


def test_without_the_library_local_data_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install datasets.*local data work without it"):
        read("c4", "calibration")


def test_a_missing_network_is_reported_at_once(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no name service")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UsageError, match=r"cannot be reached.*sotu"):
        hub.require_network("c4")


def test_an_http_error_counts_as_reachable(monkeypatch):
    def forbidden(address, timeout):
        raise urllib.error.HTTPError(address, 403, "Forbidden", None, None)

    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    hub.require_network("c4")
