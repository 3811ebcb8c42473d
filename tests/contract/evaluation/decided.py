"""Where dmoa's scorer and the second one disagree on recorded replies: who is right, decided by hand, in our own words.

Benchmark -> (row, model or `*` for every model whose reply to the row they disagree on) -> who is right, and why.
"""

from __future__ import annotations

_QUOTES = ("ours", "without quotes it is a literal of another type; the right answer is a string")
_VALUE = ("ours", "the same value in another spelling")
_TYPE = ("ours", "a number and the string of it are two values")
_FIELD = ("ours", "the field's quotes are JSON's, whichever kind they are")
_CORRECTED = ("ours", "the text after the JSON corrects it")
_AGAIN = ("ours", "the first JSON leaves a blank; the second one, to the same question, fills it")
_PROSE = ("second", "a sentence that gives no number, or another one; no reader should trust its last number")

DECIDED: dict[str, dict[tuple[str, str], tuple[str, str]]] = {
    "gsm8k": {
        ("220", "Yi-1.5-9B-Chat"): ("ours", "JSON says 60; the text after it corrects it to 70"),
        ("265", "Yi-1.5-9B-Chat"): ("ours", "JSON says 12,000; the text after it calls that a mistake: 9,500"),
        ("820", "Yi-1.5-9B-Chat"): ("ours", "JSON says 128; the text after it works out 720"),
        ("1027", "Yi-1.5-9B-Chat"): ("second", "JSON says $9; prose after it names $12, in words that no reader should trust"),
        ("1079", "Yi-1.5-9B-Chat"): ("ours", "JSON says 20; the text after it corrects it to 10%"),
    },
    "cruxeval_o": {
        ("1", "*"): _TYPE,
        ("6", "*"): _TYPE,
        ("29", "*"): _QUOTES,
        ("48", "*"): _FIELD,
        ("51", "*"): _TYPE,
        ("64", "*"): _QUOTES,
        ("81", "*"): _TYPE,
        ("82", "*"): _CORRECTED,
        ("94", "*"): _VALUE,
        ("100", "*"): ("ours", "of two equal keys Python keeps the last value"),
        ("134", "*"): _QUOTES,
        ("145", "*"): _VALUE,
        ("207", "*"): _VALUE,
        ("213", "*"): ("ours", "a list with a string; the right answer is a string with brackets"),
        ("217", "*"): _FIELD,
        ("240", "*"): _QUOTES,
        ("248", "*"): _VALUE,
        ("252", "*"): ("ours", "JSON's escape is undone: one backslash, as in the right answer"),
        ("263", "*"): _FIELD,
        ("278", "*"): ("ours", "an assertion and a line `Answer:` state the value; there is no JSON"),
        ("289", "*"): ("ours", "quotes inside of quotes of the same kind: no literal, and as text another one"),
        ("304", "*"): _VALUE,
        ("312", "*"): _QUOTES,
        ("338", "gemma-2-9b-it"): ("ours", "of two equal keys Python keeps the last value"),
        ("338", "*"): _TYPE,
        ("343", "*"): _VALUE,
        ("353", "*"): ("second", "prose repeats JSON's 4 in quotes of its own"),
        ("369", "*"): ("ours", "a line `Answer:` states the value"),
        ("372", "*"): ("ours", "an empty list is not a list with an empty string"),
        ("378", "*"): ("ours", "the object is not closed, the field is whole"),
        ("398", "*"): _VALUE,
        ("415", "*"): ("ours", "of two equal keys Python keeps the last value"),
        ("435", "*"): ("ours", "an assertion and a line `Answer:` state the value"),
        ("441", "*"): _TYPE,
        ("482", "*"): _FIELD,
        ("509", "*"): _QUOTES,
        ("519", "*"): _TYPE,
        ("537", "*"): _QUOTES,
        ("578", "*"): _VALUE,
        ("584", "*"): _QUOTES,
        ("609", "*"): ("ours", "the literal stands before a remark in parentheses"),
        ("612", "*"): _FIELD,
        ("652", "*"): _QUOTES,
        ("658", "*"): _FIELD,
        ("670", "*"): _TYPE,
        ("683", "*"): ("ours", "one quote too many after the literal"),
        ("690", "*"): _QUOTES,
        ("734", "*"): ("ours", "a line `Answer:` states the value"),
        ("760", "*"): ("ours", "names without quotes in a list are no strings"),
        ("766", "Qwen2-7B-Instruct"): ("ours", "the keys have quotes inside of their quotes"),
        ("766", "*"): _FIELD,
        ("797", "*"): ("ours", "typographic quotes are quotes"),
    },
    "math": {
        ("50", "*"): ("ours", "a loop that never answers"),
        ("128", "*"): _AGAIN,
        ("145", "*"): ("ours", "cut before an answer; what both read is by chance, and only one number is right"),
        ("147", "*"): ("ours", "JSON says 4i"),
        ("241", "*"): ("ours", "it states 1152 and says that 144 serves the format"),
        ("277", "*"): ("ours", "cut at 10/3, which is not 3"),
        ("437", "*"): ("ours", "the right number with its base"),
        ("655", "*"): _AGAIN,
        ("688", "*"): _PROSE,
        ("705", "*"): ("ours", "cut before an answer; what both read is by chance"),
    },
}
