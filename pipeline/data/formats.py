"""Reads training rows from several kinds of files and conversation formats, and explains invalid rows."""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, get_args

import orjson

from pipeline.common.messages import (
    CALLS,
    THOUGHTS,
    InvalidRow,
    from_json,
    is_empty,
    message,
    require_known,
    require_text,
    require_turns,
    tools_of,
    with_results,
)
from pipeline.common.parameters.merge import Column
from pipeline.common.rows import Message, Tools, question_and_answer

LARGEST = 10 * 2**20  # maximum bytes of a row: far more than the context of any base
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KEYS = {*get_args(Column)}  # keys of the supported formats
BOM = b"\xef\xbb\xbf"
# Keys of other formats, in a row or a message. Without their values, the row would have another meaning.
TOOLS = {"tools", "functions", *CALLS, "parallel_tool_calls", "tool_choice", "chat_template_kwargs"}
THINKING = {*THOUGHTS, "reasoning_details", "tool_plan"}
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
PREFERENCES = {"chosen", "rejected", "label", "labels", "kto_tag", "preferred_output", "non_preferred_output"}
VERDICTS = {"label", "labels", "kto_tag"}  # false is a value here, not "no key"
TEXTS = {"query", "response", "choices", "options", "answers", "completions", "history", "system_prompt"}
SOURCES = {"context", "passage", "passages", "documents"}
OTHER_KEYS = TOOLS | THINKING | MEDIA | PREFERENCES | TEXTS | SOURCES
FUNCTION_KEYS = {"type", "name", "description", "parameters"}
CALL_KEYS = ("name", "arguments", "parameters")
TRAINED = ("weight", "train", "training", "loss")  # whether a message is trained on
PARTS = {"role", "content", "from", "value", "tool_call_id", "name", "refusal", "prefix", "train_detail", *TRAINED}
PARTS |= TOOLS | THINKING | MEDIA
TURNS = ("messages", "conversations", "prompt", "completion", *sorted(PREFERENCES - VERDICTS))  # may have messages
UNREAD = "(not read)"  # a cell of a table


Record = tuple[int, bytes | InvalidRow]


def kind(file: Path) -> str:
    """The suffix without .gz: ".jsonl", ".json", ".csv", ".parquet", or another."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def records(file: Path, columns: Mapping[Any, str]) -> Iterator[Record]:
    """Yield (number, record) for each line, item of a JSON list or row of a table. A record is JSON or an InvalidRow.

    `columns` maps our names to the column names of CSV and Parquet files: {"question": "Frage"}. A damaged file gives
    the rows before the damage, then one InvalidRow. A .json file is read into memory at once, other files row by row.
    """
    number = 0
    try:
        match kind(file):
            case ".jsonl":
                found = lines(file)
            case ".json":
                found = items(file)
            case ".csv":
                found = csv_rows(file, columns)
            case _:
                found = parquet_rows(file, columns)
        for number, record in found:
            too_large = isinstance(record, bytes) and len(record) > LARGEST
            yield number, oversize() if too_large else record
    except (OSError, EOFError, zlib.error) as error:
        yield number + 1, unreadable(error)


def opened(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def lines(file: Path) -> Iterator[Record]:
    with opened(file) as text:
        for number in itertools.count(1):
            line = text.readline(LARGEST + 1)
            if not line:
                return
            too_large = len(line) > LARGEST
            rest = line
            while len(rest) > LARGEST and not rest.endswith(b"\n"):
                rest = text.readline(LARGEST + 1)
            if too_large:
                yield number, oversize()
            elif (line := line.removeprefix(BOM if number == 1 else b"").strip()) and not line.startswith(b"#"):
                yield number, line  # a line that starts with # is a comment


def items(file: Path) -> Iterator[Record]:
    with opened(file) as text:
        try:
            content = parsed(text.read().removeprefix(BOM))
        except InvalidRow as invalid:
            yield 1, invalid
            return
    for number, item in enumerate(content if isinstance(content, list) else [content], start=1):
        yield number, dumped(item)


def csv_rows(file: Path, columns: Mapping[Any, str]) -> Iterator[Record]:
    csv.field_size_limit(LARGEST)
    with opened(file) as binary:
        # Bytes that are not UTF-8 become lone surrogates; `dumped` then rejects the row.
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header = text.readline()
        delimiter = max(",;\t", key=header.count)
        table = csv.DictReader(itertools.chain([header], text), delimiter=delimiter, strict=True)
        start = 1
        try:
            names = list(table.fieldnames or [])
            if len(set(names)) < len(names):
                yield 1, InvalidRow("unreadable", "two columns have the same name: rename one")
                return
            while True:
                start = table.reader.line_num + 1
                row = next(table)
                cells = list(row.values())
                number = table.line_num - sum(cell.count("\n") for cell in cells if isinstance(cell, str))
                if None in row or None in cells:
                    yield number, InvalidRow("not CSV", f"the row does not have the {len(names)} cells of the header")
                else:
                    yield number, as_record(row, columns)
        except StopIteration:
            return
        except csv.Error as error:  # the next row cannot be found any more
            yield start, unreadable(error)


def parquet_rows(file: Path, columns: Mapping[Any, str]) -> Iterator[Record]:
    import pyarrow  # 170 MB, which inference does not need
    from pyarrow import parquet

    try:
        with opened(file) as binary:
            table = parquet.ParquetFile(binary)
            names = table.schema_arrow.names
            wanted = [name for name in names if name in KEYS or name in columns.values()]
            if len(set(wanted)) < len(wanted):
                yield 1, InvalidRow("unreadable", "two columns have the same name: rename one")
            elif not wanted:
                rows = range(1, table.metadata.num_rows + 1)
                yield from ((number, unknown_format(dict.fromkeys(names))) for number in rows)
            else:
                others = [name for name in OTHER_KEYS.intersection(names) if name not in wanted]
                unread = dict.fromkeys((name for name in names if name not in wanted), UNREAD)
                batches = table.iter_batches(batch_size=64, columns=wanted + others)
                cells = ((batch, at) for batch in batches for at in range(batch.num_rows))
                for number, (batch, at) in enumerate(cells, start=1):
                    try:
                        found = {name: without_absent(batch[name][at].as_py()) for name in wanted}
                        nothing = {name: None for name in others if is_empty(batch[name][at].as_py())}
                        yield number, as_record(found | unread | nothing, columns)
                    except UnicodeDecodeError:
                        yield number, not_utf8()
                    except (ValueError, OverflowError, KeyError) as error:
                        yield number, unreadable(error)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def without_absent(value: Any, within: bool = False) -> Any:
    """`value` without the nulls in its calls and tools: a column of structures gives each call the arguments of all."""
    match value:
        case dict():
            kept = {key: part for key, part in value.items() if not (within and part is None)}
            return {key: without_absent(part, within or key in {*TOOLS, "function"}) for key, part in kept.items()}
        case list():
            return [without_absent(part, within) for part in value]
    return value


def as_record(row: dict[str, Any], columns: Mapping[Any, str]) -> bytes | InvalidRow:
    """The JSON of a table row with our column names, or an InvalidRow."""
    for ours, theirs in columns.items():
        if ours != theirs and theirs in row and ours not in columns.values() and not is_empty(row.get(ours)):
            explanation = f"the table has {ours} and {theirs}, but merge.columns reads {theirs} as {ours}: rename one"
            return InvalidRow("unreadable", explanation)
    mapped = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    return dumped({name: value for name, value in row.items() if name not in columns.values()} | mapped)


def dumped(content: Any) -> bytes | InvalidRow:
    """`content` as JSON, or an InvalidRow."""
    try:
        return orjson.dumps(content)
    except orjson.JSONEncodeError as error:
        return not_utf8() if "surrogates" in str(error) else unreadable(error)


def parsed(text: bytes) -> Any:
    """Parse JSON. Raises InvalidRow if `text` is not JSON in UTF-8."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            text.decode()
        except UnicodeDecodeError:
            raise not_utf8() from None
        if "surrogate" in str(error):
            raise InvalidRow("not UTF-8", "half of a surrogate pair, which is not a character") from None
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InvalidRow("not JSON", f"not JSON: {error.msg} ({line}column {error.colno})") from None


def conversation(content: Any) -> tuple[list[Message], Tools]:
    """The messages and tools of a row in any supported format. The keys decide which format it is.

    Raises:
        InvalidRow: the format is unknown, the row has keys that its format does not use, the roles are in another
            order than `require_turns` wants, or a content is not text.
    """
    for key in ("messages", "conversations"):  # of a CSV file
        if isinstance(content, dict) and isinstance(content.get(key), str) and content[key].lstrip().startswith("["):
            content = content | {key: from_json(content[key], key)}
    if judged := verdicts(content):
        raise InvalidRow(
            "unknown format",
            f"a row with {judged[0]} says which answers are better: move it to data/preferences, or leave out "
            f"{judged[0]}",
        )
    match content:
        case {"messages": list(turns)}:
            used = {"messages"}
            messages = [trained_message(turn) for turn in turns]
        case {"conversations": list(turns)}:
            used = {"conversations"}
            messages = [trained_message(turn) for turn in turns]
        case {"prompt": list(prompt), "completion": list(completion)}:
            used = {"prompt", "completion"}
            messages = [trained_message(turn) for turn in [*prompt, *completion]]
        case {"instruction": str(instruction), "output": answer}:
            used = {"instruction", "input", "output"}
            messages = [*asked(with_input(instruction, content)), answered(answer)]
        case {"question": question, "answer": answer}:
            used = {"question", "answer"}
            messages = [*asked(question), answered(answer)]
        case {"prompt": question, "completion": answer}:
            used = {"prompt", "completion"}
            messages = [*asked(question), answered(answer)]
        case {"text": str()}:
            raise InvalidRow("unknown format", "a row with text is no conversation: move it to data/corpus")
        case _:
            raise unknown_format(content)
    tools = "functions" if is_empty(content.get("tools")) else "tools"
    require_used("a row", content, used | {"system", tools}, KEYS | OTHER_KEYS)
    return complete(messages, content)


def complete(messages: list[Message], content: dict[str, Any]) -> tuple[list[Message], Tools]:
    """The messages after the system message of the row `content`, and its tools. Raises InvalidRow."""
    if system := content.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    require_text(messages)
    require_turns(messages)
    offered = tools_of(content.get("tools")) or tools_of(content.get("functions"))
    require_known(messages, offered)
    return with_results(messages), offered


def verdicts(content: Any) -> list[str]:
    """The keys with a value by which a row compares or judges answers."""
    keys = [key for key in content if key in PREFERENCES] if isinstance(content, dict) else []
    return [key for key in keys if not is_empty(content[key]) or (content[key] is False and key in VERDICTS)]


def asked(question: Any) -> list[Message]:
    return question_and_answer(question, "")[:1]


def answered(answer: Any) -> Message:
    return message({"role": "assistant", "content": answer})


def require_used(what: str, content: dict[str, Any], used: set[str], known: set[str]) -> None:
    """Raises InvalidRow if a known key has a value that is not used."""
    for key in content:
        says_false = content[key] is False and key in VERDICTS
        if key not in used and key in known and (says_false or not is_empty(content[key])):
            raise InvalidRow(
                "unknown format",
                f"{what} with {key}, which is not trained on beside {' and '.join(sorted(used & content.keys()))}: "
                "write it into the text, or leave it out",
            )


def trained_message(turn: Any) -> Message:
    """`message`. Raises InvalidRow also if the turn has a part that is not used, or if it must not be trained on."""
    found = message(turn)
    used = {"role", "content"} if {"from", "value"} - turn.keys() else {"from", "value"}
    used |= {"assistant": {*CALLS, *THOUGHTS}, "tool": {"name", "tool_call_id"}}.get(found["role"], set())
    require_used("a message", turn, used.union(TRAINED), PARTS)
    as_it_is = (None, True) if found["role"] == "assistant" else (None, True, False)
    if key := next((key for key in TRAINED if turn.get(key) not in as_it_is), None):
        raise InvalidRow("unknown format", f"a message with {key}: all answers of a row are trained on")
    return found


def unknown_keys(content: dict[str, Any]) -> set[str]:
    """The keys of a valid row, of its messages and of their parts that no format knows."""
    found = content.keys() - KEYS - OTHER_KEYS
    for key in TURNS:
        for turn in objects(content.get(key)):
            found |= {f"messages[].{name}" for name in turn.keys() - PARTS}
            for part in objects(turn.get("content")):
                found |= {f"messages[].content[].{name}" for name in part.keys() - {"type", "text"}}
            for call in objects(turn.get("tool_calls")):
                of_call = {"id", "type", "index", "function"} if "function" in call else {"id", "type", *CALL_KEYS}
                found |= {f"messages[].tool_calls[].{name}" for name in call.keys() - of_call}
    for tool in objects(content.get("tools")):
        function = tool.get("function", tool)
        if isinstance(function, dict):
            found |= {f"tools[].function.{name}" for name in function.keys() - FUNCTION_KEYS}
            found |= {f"tools[].{name}" for name in tool.keys() - {"function", *FUNCTION_KEYS}}
    return found


def objects(value: Any) -> list[dict[str, Any]]:
    """`value`, if it is an object, or its items that are objects."""
    if isinstance(value, dict):
        return [value]
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def with_input(instruction: str, content: dict[str, Any]) -> Any:
    """Alpaca's instruction, with its input if the row has one."""
    match content.get("input"):
        case None:
            return instruction
        case str(given):
            return f"{instruction}\n\n{given}" if given.strip() else instruction
        case given:
            raise InvalidRow("no text", f"its input is not text but {type(given).__name__}")


def unknown_format(content: Any) -> InvalidRow:
    keys = list(content) if isinstance(content, dict) else type(content).__name__
    return InvalidRow(
        "unknown format",
        "a row needs messages, conversations, instruction and output, prompt and completion, or question and answer "
        f"(other column names of CSV and Parquet files: set merge.columns); this row has {repr(keys)[:200]}",
    )


def oversize() -> InvalidRow:
    return InvalidRow("too large", f"more than {LARGEST // 2**20} MiB in one row")


def not_utf8() -> InvalidRow:
    return InvalidRow("not UTF-8", "not UTF-8: save the file as UTF-8")


def unreadable(error: Exception) -> InvalidRow:
    return InvalidRow("unreadable", f"cannot be read from here on: {' '.join(str(error).split())}")
