"""The Inception network of FID: figures that pytorch-fid's own code gave on the same random weights."""

from __future__ import annotations

import hashlib
import io

import pytest
import torch
from helpers.inception import images_of, random_state

from trainer.__main__ import main
from trainer.metrics.distances import frechet_distance
from trainer.metrics.inception import INCEPTION, Inception
from trainer.metrics.study import BASE, Judges, Study

# pytorch-fid at b9c1811, InceptionV3([3]) on `random_state`: features 0, 512, 1024, 1536 of both images, mean and s.d. of all
GOLDEN = {
    (64, 64): ([0.15785453, 0.6508559, 1.2505417, 0.4443071, 0.1347553, 0.491778, 1.0934824, 0.4792346], 0.67121536, 0.9066740),
    (400, 320): ([0.1734621, 0.9873687, 1.7315665, 0.5935105, 0.1199836, 0.6072003, 1.3124126, 0.5148448], 0.8430326, 1.1533051),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / INCEPTION.name
    torch.save(random_state(), path)
    return path


def test_features_are_those_of_pytorch_fid(file):
    network = Inception.load(file)
    for size, (some, mean, spread) in GOLDEN.items():
        found = network(images_of(size))
        assert found.shape == (2, 2048)
        torch.testing.assert_close(found[:, ::512].flatten(), torch.tensor(some), rtol=1e-4, atol=1e-4)
        assert (float(found.mean()), float(found.std())) == pytest.approx((mean, spread), rel=1e-4)
        stored = network(images_of(size) + 0.4 / 255)  # the same 8-bit file
        assert float((stored - found).abs().max()) < 1e-4


def test_a_file_of_another_network_is_refused(file, tmp_path):
    state = torch.load(file)
    torch.save({k: v for k, v in state.items() if not k.startswith("Mixed_7c")}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"less.pth belongs to another model: it lacks \d+ weights \(Mixed_7c"):
        Inception.load(tmp_path / "less.pth")


def test_a_study_has_the_published_fid_of_each_point(tmp_path):
    def judges(x):
        return x.mean((2, 3))

    rng = torch.Generator().manual_seed(0)
    images = {BASE: torch.rand(12, 3, 8, 8, generator=rng), ("a", 0): torch.rand(12, 3, 8, 8, generator=rng) * 0.7}
    prompts = [p for p in ("x", "y", "z") for _ in range(4)]
    study = Study(tmp_path / "s", prompts, [("a", 0)], Judges({"r": lambda i, p: i.mean((1, 2, 3))}, {"f": judges}, inception=judges), {})
    study.open(resume=False, overwrite=False)
    for part in study.parts(12):
        study.add(part, images)
    real = torch.rand(20, 3, 8, 8, generator=rng)
    found = study.summarise({"f": [judges(real)], "fid_inception": iter([judges(real)[:9], judges(real)[9:]])})
    expected = {name: frechet_distance(judges(images[point]), judges(real)) for name, point in (("base", BASE), ("point", ("a", 0)))}
    assert found["base"]["fid_inception"] == pytest.approx(expected["base"]) and study.widths == {"f": 3, "fid_inception": 3}
    assert found["points"][0]["fid_inception"] == pytest.approx(expected["point"]) and expected["point"] > 2 * expected["base"]
    assert found["features"] == ["f"]
    with pytest.raises(ValueError, match=r"r gave nan to an image of 'y'"):
        study.judges.judge(images[BASE].index_fill(0, torch.tensor([5]), torch.nan), prompts)


def test_the_network_is_downloaded_as_rewards_are(tmp_path, monkeypatch, capsys):
    content, asked = b"weights", []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(content))
    command = ["rewards", "download", "inception", "--folder", str(tmp_path)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "does not begin with 6726825d" in said and said.count("\n") == 1 and not [*(tmp_path / "inception").iterdir()]
    digest = hashlib.sha256(content).hexdigest()
    object.__setattr__(INCEPTION, "sha256", digest[:8])
    try:
        assert main(command) == 0
    finally:
        object.__setattr__(INCEPTION, "sha256", "6726825d")
    assert asked == [INCEPTION.url] * 2
    record = (tmp_path / "inception" / (INCEPTION.name + ".json")).read_text()
    assert digest in record and "mseitzer/pytorch-fid" in record
