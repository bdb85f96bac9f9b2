"""What the comparisons with other engines share: child processes, the peers' installation, the machine, tables."""

import argparse
import json
import os
import pathlib
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPENVINO_PACKAGE = "openvino-genai==2026.4.1.0"
DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUSY_CORES_TOLERATED = 0.1


class Failed(Exception):
    pass


def say(text):
    print(text, file=sys.stderr, flush=True)


def end_group(child):
    """Kills a child's whole process group, which outlives its leader when that left children behind."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


class Children:
    """Runs one command at a time in a process group of its own, and never leaves one behind."""

    def __init__(self, timeout_s):
        self.timeout_s = timeout_s

    def run(self, command, timeout_s=None, statuses=(0,)):
        command = [str(part) for part in command]
        timeout_s = timeout_s or self.timeout_s
        shown = shlex.join(command)
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     start_new_session=True, text=True, errors="replace")
        except OSError as error:
            raise Failed(f"cannot run {command[0]}: {error.strerror}") from None
        try:
            output, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"no result within {timeout_s} s (--timeout): {shown}") from None
        finally:
            end_group(child)
        if child.returncode not in statuses:
            tail = "\n".join((errors or output).strip().splitlines()[-8:])
            raise Failed(f"exit status {child.returncode}: {shown}\n{tail}")
        return output


def cache_directory():
    return pathlib.Path(os.environ.get("JOINTKV_CACHE") or pathlib.Path.home() / ".cache" / "jointkv")


def default_model():
    return pathlib.Path(os.environ.get("JOINTKV_MODEL") or cache_directory() / "models" / DEFAULT_MODEL)


def llama_programs(names, children, bin_directory=None):
    """The folder of llama.cpp's programs `names`, from the pinned source; built where they are missing.

    They get a build tree of their own, so that the libraries JointKV links are left alone. It has the options of those
    libraries, and the server without its page, which would be fetched.
    """
    if bin_directory is None:
        lines = children.run(["bash", "-c", f'source "{ROOT}/tools/cache_paths.sh" && llama_cpp_src && llama_cpp_build'
                              ' && printf "%s\\n" "${llama_cpp_options[@]}"']).splitlines()
        source, libraries, options = pathlib.Path(lines[0]), pathlib.Path(lines[1]), lines[2:]
        build = libraries.parent / "peers"
        bin_directory = build / "bin"
        if not all(os.access(bin_directory / name, os.X_OK) for name in names):
            if not (source / "CMakeLists.txt").exists():
                raise Failed(f"there is no llama.cpp source in {source}; run `make setup` first")
            say(f"building {', '.join(names)} in {build} (some minutes)")
            children.run(["cmake", "-G", "Ninja", "-S", source, "-B", build, *options, "-DLLAMA_BUILD_SERVER=ON",
                          "-DLLAMA_BUILD_UI=OFF"])
            children.run(["cmake", "--build", build, "--target", *names], timeout_s=3600)
    for name in names:
        if not os.access(bin_directory / name, os.X_OK):
            raise Failed(f"there is no program {bin_directory / name}")
    return bin_directory


def install_in_venv(package, home, children):
    """The Python of a virtual environment that has the package, NAME==VERSION; made where it is missing."""
    python = home / "bin" / "python"
    name, version = package.split("==")
    query = f"import importlib.metadata as m; print(m.version('{name}'))"
    try:
        if children.run([python, "-c", query]).strip() == version:
            return python
    except Failed:
        pass
    say(f"installing {package} in {home}")
    children.run([sys.executable, "-m", "venv", "--clear", home], timeout_s=600)
    children.run([python, "-m", "pip", "install", "--quiet", package], timeout_s=1800)
    return python


def install_openvino(children):
    return install_in_venv(OPENVINO_PACKAGE, cache_directory() / "peers" / "openvino", children)


def random_words(draw, count):
    words = ("alpha house tree river stone light water paper table green small large quick brown fox jumps over lazy dog "
             "and then some more words for the time of day").split()
    return " ".join(draw.choice(words) for _ in range(count))


def at_least_one(text):
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def cpu_name():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def busy_cores(seconds=1.0):
    """Cores that other programs keep busy (or the host takes away) while this one sleeps; None when unknown."""
    def read():
        fields = [int(value) for value in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle and iowait
    try:
        total, idle = read()
        time.sleep(seconds)
        total, idle = (after - before for after, before in zip(read(), (total, idle)))
        return round(os.cpu_count() * (1 - idle / total), 2)
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return None


def warn_if_busy(busy, file):
    most = max((value for value in busy if value is not None), default=0)
    if most > BUSY_CORES_TOLERATED:
        print(f"Other programs kept up to {most:.1f} of {os.cpu_count()} cores busy: engines that spin at barriers lose "
              "most by it. Repeat on an idle machine before quoting.", file=file)


def summarise(samples, base):
    """Medians per row and peer, and medians of the per-round ratios of `base` to the others.

    A sample is {"round": number, "peer": name, "values": {row: number}}.
    """
    peers = list(dict.fromkeys(sample["peer"] for sample in samples))
    summary = {}
    for row in dict.fromkeys(row for sample in samples for row in sample["values"]):
        rounds = {peer: {s["round"]: s["values"][row] for s in samples
                         if s["peer"] == peer and s["values"].get(row) is not None} for peer in peers}
        entry = {"values": {}, "ratios": {}}
        for peer in peers:
            values = list(rounds[peer].values())
            if values:
                entry["values"][peer] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            common = [rounds[base][r] / rounds[peer][r] for r in rounds.get(base, {}) if rounds[peer].get(r)]
            if peer != base and common:
                entry["ratios"][f"{base}/{peer}"] = statistics.median(common)
        summary[row] = entry
    return summary


def print_table(title, summary, peers, file, digits=None):
    """`digits`: decimals by row, where they are not 0."""
    ratios = sorted({ratio for entry in summary.values() for ratio in entry["ratios"]})
    header = [title, *peers, *ratios]
    rows = [header]
    for name, entry in summary.items():
        places = (digits or {}).get(name, 0)
        row = [name]
        for peer in peers:
            value = entry["values"].get(peer)
            row.append("{median:.{p}f} ({min:.{p}f}-{max:.{p}f})".format(p=places, **value) if value else "-")
        row += [f"{entry['ratios'][ratio]:.2f}" if ratio in entry["ratios"] else "-" for ratio in ratios]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)),
              file=file)


def take_turns(rounds, peers, engines, errors, measure, show):
    """Round by round, each in another order: measure(engine, round) of every engine that was not left out.

    Gives the samples and how many cores others kept busy before each round. An engine that fails moves from `engines`
    to `errors`.
    """
    samples, busy = [], []
    for index in range(rounds):
        order = [peer for peer in peers if peer in engines]
        shift = index % max(len(order), 1)
        busy.append(busy_cores())
        for peer in order[shift:] + order[:shift]:
            start = time.monotonic()
            try:
                values = measure(engines[peer], index)
            except Failed as error:
                errors[peer] = str(error)
                del engines[peer]
                say(f"{peer}: left out from now on: {error}")
                continue
            samples.append({"round": index, "peer": peer, "values": values})
            say(f"round {index + 1}/{rounds} {peer} ({time.monotonic() - start:.0f} s): {show(values)}")
    return samples, busy


def prepare_all(engines, errors):
    """Prepares each engine; those that fail move to `errors`."""
    for peer, engine in list(engines.items()):
        try:
            engine.prepare()
        except Failed as error:
            errors[peer] = str(error)
            del engines[peer]
            say(f"{peer}: left out: {error}")


def write_report(report, where):
    """`where`: None, a path, or "-". Whether it was written."""
    text = json.dumps(report, indent=1)
    if where == "-":
        print(text)
    elif where:
        try:
            pathlib.Path(where).write_text(text + "\n")
        except OSError as error:
            say(f"cannot write {where}: {error.strerror}")
            return False
    return True


def run_main(main):
    """Runs main() so that Ctrl-C and SIGTERM unwind it, and exits with its status."""
    def interrupted(signum, frame):
        del signum, frame
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("\ninterrupted; every engine was stopped")
        sys.exit(130)
    except Failed as error:
        say(error)
        sys.exit(1)
