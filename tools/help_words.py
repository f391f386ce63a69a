"""What tools/make_help.py puts between the texts of a node, in each language that has help pages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The words of a page's reference; `{}` stands for what they are about."""

    inputs: str
    outputs: str
    whole_number: str
    span: str  # lowest, highest, default
    file: str
    choice: str
    text: str
    switch: str
    optional: str
    along_with: str  # input, choice
    colon: str
    comma: str
    brackets: str


WORDS = {
    "en": Words(
        "Inputs", "Outputs", "a whole number", "{:g} to {:g}, default {:g}", "a file or folder", "a choice", "text",
        "on or off", "optional", "with {} {}", ": ", ", ", " ({})",
    ),
    "zh": Words(
        "输入", "输出", "整数", "{:g} 到 {:g}，默认 {:g}", "文件或文件夹", "选项", "文本",
        "开或关", "可选", "仅当 {} 为 {}", "：", "，", "（{}）",
    ),
    "ja": Words(
        "入力", "出力", "整数", "{:g}～{:g}、既定値は{:g}", "ファイルまたはフォルダ", "選択肢", "テキスト",
        "オンまたはオフ", "任意", "{} が {} のとき", "：", "、", "（{}）",
    ),
}  # fmt: skip
