"""Classes that compute softmax(q k^T) v themselves, operation by operation.

Their own `forward` runs, and what it does with the product of queries and keys is read on the way:
see `flashpatch.reading`. A row is a class, and whether its model's masks may be compact ones.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from flashpatch.dispatch import DEFAULT, UNREAD, Settings, fall_back
from flashpatch.inspection import places
from flashpatch.patches.interface import why_blocked
from flashpatch.products import released
from flashpatch.reading import Reading, know_buffers
from flashpatch.registry import Patch, register

# Classes that only add the mask they are given, so that it may be a compact one.
KEYED = (
    "codegen.modeling_codegen.CodeGenAttention",
    "convbert.modeling_convbert.ConvBertSelfAttention",
    "flava.modeling_flava.FlavaSelfAttention",
    "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention",
    "ibert.modeling_ibert.IBertSelfAttention",
    "imagegpt.modeling_imagegpt.ImageGPTAttention",
    "luke.modeling_luke.LukeSelfAttention",
    "megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention",
    "mpnet.modeling_mpnet.MPNetSelfAttention",
    "rembert.modeling_rembert.RemBertSelfAttention",
    "roformer.modeling_roformer.RoFormerSelfAttention",
    "squeezebert.modeling_squeezebert.SqueezeBertSelfAttention",
    "tapas.modeling_tapas.TapasSelfAttention",
    "visual_bert.modeling_visual_bert.VisualBertSelfAttention",
)
# Classes that slice or invert it first, or whose masks are their own model's.
CLASSES = (
    "aimv2.modeling_aimv2.Aimv2AttentionPoolingHead",
    "bark.modeling_bark.BarkSelfAttention",
    "big_bird.modeling_big_bird.BigBirdSelfAttention",
    "bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusSelfAttention",
    "blip.modeling_blip.BlipAttention",
    "blip.modeling_blip_text.BlipTextSelfAttention",
    "bros.modeling_bros.BrosSelfAttention",
    "canine.modeling_canine.CanineSelfAttention",
    "clap.modeling_clap.ClapAudioSelfAttention",
    "clvp.modeling_clvp.ClvpSelfAttention",
    "cpmant.modeling_cpmant.CpmAntAttention",
    "cvt.modeling_cvt.CvtSelfAttention",
    "dab_detr.modeling_dab_detr.DabDetrAttention",
    "dab_detr.modeling_dab_detr.DetrAttention",
    "data2vec.modeling_data2vec_vision.Data2VecVisionSdpaSelfAttention",
    "data2vec.modeling_data2vec_vision.Data2VecVisionSelfAttention",
    "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionAttention",
    "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention",
    "donut.modeling_donut_swin.DonutSwinSelfAttention",
    "evolla.modeling_evolla.EvollaSequenceAlignerCrossAttention",
    "evolla.modeling_evolla.EvollaSequenceCompressorAttention",
    "falcon.modeling_falcon.FalconAttention",
    "fastspeech2_conformer.modeling_fastspeech2_conformer.FastSpeech2ConformerAttention",
    "flaubert.modeling_flaubert.MultiHeadAttention",
    "fsmt.modeling_fsmt.Attention",
    "funnel.modeling_funnel.FunnelRelMultiheadAttention",
    "gemma3n.modeling_gemma3n.Gemma3nAudioAttention",
    "gemma4.modeling_gemma4.Gemma4AudioAttention",
    "git.modeling_git.GitSelfAttention",
    "glpn.modeling_glpn.GLPNEfficientSelfAttention",
    "got_ocr2.modeling_got_ocr2.GotOcr2VisionAttention",
    "granite_speech.modeling_granite_speech.GraniteSpeechConformerAttention",
    "granite_speech_plus.modeling_granite_speech_plus.GraniteSpeechPlusConformerAttention",
    "grounding_dino.modeling_grounding_dino.GroundingDinoMultiheadAttention",
    "groupvit.modeling_groupvit.GroupViTAttention",
    "hiera.modeling_hiera.HieraMaskUnitAttention",
    "idefics.perceiver.IdeficsPerceiverAttention",
    "informer.modeling_informer.InformerProbSparseAttention",
    "kosmos2_5.modeling_kosmos2_5.Kosmos2_5VisionAttention",
    "layoutlmv2.modeling_layoutlmv2.LayoutLMv2SelfAttention",
    "layoutlmv3.modeling_layoutlmv3.LayoutLMv3SelfAttention",
    "led.modeling_led.LEDDecoderAttention",
    "levit.modeling_levit.LevitAttention",
    "levit.modeling_levit.LevitAttentionSubsample",
    "lilt.modeling_lilt.LiltSelfAttention",
    "longt5.modeling_longt5.LongT5LocalAttention",
    "longt5.modeling_longt5.LongT5TransientGlobalAttention",
    "lxmert.modeling_lxmert.LxmertAttention",
    "mask2former.modeling_mask2former.Mask2FormerAttention",
    "maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention",
    "mgp_str.modeling_mgp_str.MgpstrAttention",
    "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoMultiheadAttention",
    "mobilevit.modeling_mobilevit.MobileViTSelfAttention",
    "mpt.modeling_mpt.MptAttention",
    "mvp.modeling_mvp.MvpAttention",
    "nystromformer.modeling_nystromformer.NystromformerSelfAttention",
    "omdet_turbo.modeling_omdet_turbo.OmDetTurboMultiheadAttention",
    "oneformer.modeling_oneformer.OneFormerAttention",
    "pegasus_x.modeling_pegasus_x.PegasusXGlobalLocalAttention",
    "perceiver.modeling_perceiver.PerceiverSelfAttention",
    "pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderSelfAttention",
    "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionAttention",
    "prophetnet.modeling_prophetnet.ProphetNetAttention",
    "prophetnet.modeling_prophetnet.ProphetNetNgramSelfAttention",
    "pvt.modeling_pvt.PvtEfficientSelfAttention",
    "pvt_v2.modeling_pvt_v2.PvtV2SelfAttention",
    "reformer.modeling_reformer.LocalSelfAttention",
    "sam.modeling_sam.SamVisionAttention",
    "sam.modeling_sam.SamVisionSdpaAttention",
    "sam_hq.modeling_sam_hq.SamHQVisionAttention",
    "sam_hq.modeling_sam_hq.SamHQVisionSdpaAttention",
    "seggpt.modeling_seggpt.SegGptAttention",
    "slanext.modeling_slanext.SLANeXtVisionAttention",
    "speecht5.modeling_speecht5.SpeechT5Attention",
    "superglue.modeling_superglue.SuperGlueSelfAttention",
    "swin2sr.modeling_swin2sr.Swin2SRSelfAttention",
    "swinv2.modeling_swinv2.Swinv2SelfAttention",
    "table_transformer.modeling_table_transformer.TableTransformerAttention",
    "timesformer.modeling_timesformer.TimesformerSelfAttention",
    "trocr.modeling_trocr.TrOCRAttention",
    "tvp.modeling_tvp.TvpAttention",
    "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionAttention",
    "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention",
    "vilt.modeling_vilt.ViltSelfAttention",
    "vitdet.modeling_vitdet.VitDetAttention",
    "wavlm.modeling_wavlm.WavLMAttention",
    "xglm.modeling_xglm.XGLMAttention",
    "xlm.modeling_xlm.MultiHeadAttention",
    "xlnet.modeling_xlnet.XLNetRelativeAttention",
    "torch.nn.modules.activation.MultiheadAttention",
)
# Those that add to the output in place.
CHANGE_OUTPUT = ("nystromformer.modeling_nystromformer.NystromformerSelfAttention",)

# Of these, those that are asked for the weights in every call, whether anybody wants them or not:
# their models know.
ALWAYS_ASKED = (
    "dab_detr.modeling_dab_detr.DabDetrAttention",
    "grounding_dino.modeling_grounding_dino.GroundingDinoMultiheadAttention",
    "mask2former.modeling_mask2former.Mask2FormerAttention",
    "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoMultiheadAttention",
    "oneformer.modeling_oneformer.OneFormerAttention",
)
# What a call may ask for that only the original gives.
ASKED = ("output_attentions", "head_mask", "layer_head_mask")


@dataclass(frozen=True)
class How:
    """What reading a class's forward must know of it.

    Attributes:
        places: Those of `ASKED` among its arguments, and where.
        always_asked: Whether it is asked for the weights in every call.
        changes_output: Whether it adds to its output in place.
    """

    places: tuple[tuple[str, int], ...]
    always_asked: bool
    changes_output: bool


def forward(how: How, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's own `forward`, its attention computed by an engine.

    Args:
        how: Facts about the class.
        module: The attention module.
        args: The class's own.
        kwargs: The class's own.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    cls: Any = type(module)
    asked = {name: args[at] for name, at in how.places if at < len(args)}
    asked |= {name: kwargs[name] for name in ASKED if name in kwargs}
    if how.always_asked:
        asked.pop("output_attentions", None)
    blocked = why_blocked(module, settings, asked)
    know_buffers(module)
    reading = Reading(settings, blocked, changes_output=how.changes_output)
    with reading:
        out = cls.forward(module, *args, **kwargs)
    if not reading.decided:
        fall_back(blocked or UNREAD, settings, lambda: None)
    return released(out, weights=blocked is not None)


def _reading(name: str, module: nn.Module) -> Any:
    known = places(type(module))
    asked = tuple((argument, known[argument]) for argument in ASKED if argument in known)
    return partial(forward, How(asked, name in ALWAYS_ASKED, name in CHANGE_OUTPUT), module)


def _register(name: str, *, keyed: bool) -> None:
    owner = name if name.startswith("torch.") else f"transformers.models.{name}"
    register(
        Patch(
            owner,
            keyed=keyed,
            swaps={"forward": partial(_reading, name)},
            adds_mask=keyed,
            needs_key=False,
        )
    )


for _name in KEYED:
    _register(_name, keyed=True)
for _name in CLASSES:
    _register(_name, keyed=False)
