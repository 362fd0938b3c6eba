"""Where the weights of the rewards lie: repositories, file names, revisions, and who names them."""

from __future__ import annotations

from .files import WeightFile

_FILE, _NAMES = "open_clip_model.safetensors", ("model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
_OPEN_CLIP = "open_clip 3.3: pretrained.py, constants.py"
B32 = WeightFile("timm/vit_base_patch32_clip_224.openai", _FILE, "ab5b8ef490e86faa07d3523926b842c765de1de5", _NAMES)
L14 = WeightFile("timm/vit_large_patch14_clip_224.openai", _FILE, also=_NAMES, folder="clip-l14", named_in=_OPEN_CLIP)
H14 = WeightFile("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _FILE, also=_NAMES, named_in=_OPEN_CLIP)
PICKSCORE = WeightFile(
    "yuvalkirstain/PickScore_v1",
    "model.safetensors",
    "a4e4367c6dfa7288a00c550414478f865b875800",
    ("PickScore_v1.safetensors", "pytorch_model.bin"),
)
IMAGE_REWARD = WeightFile(
    "THUDM/ImageReward",
    "ImageReward.pt",
    "c63dec8373b5c3728b1d250865c402c9546be210",
    ("ImageReward.safetensors", "model.safetensors"),
)
VOCABULARY = WeightFile(
    "google-bert/bert-base-uncased", "vocab.txt", "1a30f9711976fc1bd9879517ef1075cd161924fa", ("bert-base-uncased-vocab.txt",)
)
MPS = WeightFile(
    "RE-N-Y/mpsv1",
    "model.safetensors",
    also=("MPS_overall_checkpoint_diffsynth.safetensors", "MPS_overall_checkpoint.pth"),
    folder="mps",
)
AESTHETIC = WeightFile(
    "trl-lib/ddpo-aesthetic-predictor",
    "aesthetic-model.pth",
    "7f639699bec8126062148a47ecb1a4312d8e6688",
    ("sac+logos+ava1-l14-linearMSE.safetensors", "sac+logos+ava1-l14-linearMSE.pth"),
)
_ICT_HP = "github.com/BarretBa/ICTHP: trainer/eval/eval.py"
ICT = WeightFile("8y/ICT", "pytorch_model.bin", also=("model.safetensors",), named_in=_ICT_HP)
HP = WeightFile("8y/HP", "hp_scorer/mlp_pytorch_model.bin", also=("hp_scorer/mlp_pytorch_model.bin",), named_in=_ICT_HP)
HP_BACKBONE = WeightFile(  # the second and third name: in a copy of the whole repository, beside the head there
    "8y/HP",
    "hp_backbone/pytorch_model.bin",
    also=("hp_backbone/pytorch_model.bin", "../hp_backbone/pytorch_model.bin", "model.safetensors"),
    named_in=_ICT_HP,
)
