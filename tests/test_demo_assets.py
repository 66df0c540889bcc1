"""Files of packages are located without importing the package; a missing one gives the command that installs it."""

import pytest

from budwood.demo_assets import PackagedFile
from budwood.errors import UsageError


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    (tmp_path / "packaged_songs" / "data").mkdir(parents=True)
    (tmp_path / "packaged_songs" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return PackagedFile("packaged-songs", "1.2", "packaged_songs", "data")


def test_a_package_is_found_without_importing_it(packaged, tmp_path):
    assert packaged.locate() == tmp_path / "packaged_songs" / "data"


@pytest.mark.parametrize(("module", "inside"), [("no_such_module", "data"), ("packaged_songs", "letters")])
def test_a_missing_file_gives_the_install_command(packaged, module, inside):
    with pytest.raises(UsageError, match=rf"lacks {inside}; run: pip install --no-deps packaged-songs==1\.2"):
        PackagedFile("packaged-songs", "1.2", module, inside).locate()
