"""What a package carries is found without importing it; where it is missing, the command is given."""

import pytest

from budwood.demo_assets import PackagedFile
from budwood.errors import UsageError


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    (tmp_path / "carried_songs" / "data").mkdir(parents=True)
    (tmp_path / "carried_songs" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return PackagedFile("carried-songs", "1.2", "carried_songs", "data")


def test_a_package_is_found_without_importing_it(carrier, tmp_path):
    assert carrier.locate() == tmp_path / "carried_songs" / "data"


@pytest.mark.parametrize(("module", "inside"), [("no_such_module", "data"), ("carried_songs", "letters")])
def test_what_is_missing_is_told_with_its_command(carrier, module, inside):
    with pytest.raises(UsageError, match=rf"lacks {inside}; run: pip install --no-deps carried-songs==1\.2"):
        PackagedFile("carried-songs", "1.2", module, inside).locate()
