# The Python environment of the project, in .venv beside setup.cfg. Sourced by quickstart.sh and run_tests.sh.
#
#   prepare_environment        what the project needs
#   prepare_environment dev    and what its checks need
#
# A second call takes no time: .venv/installed* hold the checksum of the files that say what to install.
# PYTHON=/path/to/python3.12 chooses another interpreter for making it, CONSTRAINTS=tools/lock.txt the versions of that file.

VENV=.venv # run_oldest.sh has one of its own

fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints the first Python that is new enough.
find_python() {
    local candidate found="" new_enough='import sys; sys.exit(sys.version_info < (3, 10))'
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c "$new_enough" 2>/dev/null; then
            echo "$candidate"
            return
        fi
        found="$found $candidate is $("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo broken);"
    done
    fail "LiteDet needs Python 3.10 or newer;${found:- there is no ${PYTHON:-python3};} install one, or name one: PYTHON=/path/to/python3.11 bash $0"
}

prepare_environment() {
    local extra="${1:-}" python wanted
    if ! { "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' && "$VENV/bin/python" -m pip --version; } >/dev/null 2>&1; then
        python="$(find_python)" || exit 1
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$("$python" -V) has no venv module; install it (Debian, Ubuntu: apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
        [ ! -e "$VENV" ] || echo "The environment in $VENV is not whole; making it again"
        # --clear empties a half-made one.
        "$python" -m venv --clear "$VENV" || fail "the environment could not be made in $PWD/$VENV"
    fi
    # Their text decides, and the folder: an editable install points to it.
    wanted="$(CONSTRAINTS="${CONSTRAINTS:-}" "$VENV/bin/python" - <<'PYTHON'
import hashlib, os, pathlib
names = ("setup.cfg", "pyproject.toml", os.environ["CONSTRAINTS"])
text = b"".join(pathlib.Path(name).read_bytes() for name in names if name)
print(hashlib.sha256(text + os.getcwd().encode()).hexdigest())
PYTHON
    )" || fail "setup.cfg and pyproject.toml${CONSTRAINTS:+ and $CONSTRAINTS} cannot be read in $PWD"
    if [ "$(cat "$VENV/installed${extra:+-$extra}" 2>/dev/null)" != "$wanted" ] &&
        [ "$(cat "$VENV/installed-dev" 2>/dev/null)" != "$wanted" ]; then # dev holds the rest too
        echo "Installing into $VENV (the first time: some minutes, and some GB where torch comes with CUDA)"
        rm -f "$VENV"/installed*
        "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".${extra:+[$extra]}" ||
            fail "the installation failed (see above); the next start goes on with it"
        echo "$wanted" >"$VENV/installed${extra:+-$extra}"
    fi
}

# The oldest packages that setup.cfg allows, those of the checks included, in .venv-oldest: for run_oldest.sh. Python 3.10 unless
# PYTHON names another: the oldest there is, where it is installed; some of the packages have no files for the newest.
prepare_oldest() {
    local pythons="python3.10 ${PYENV_ROOT:-$HOME/.pyenv}/versions/3.10.*/bin/python"
    VENV=.venv-oldest CONSTRAINTS=.venv-oldest.txt
    PYTHON="${PYTHON:-$pythons python3.11 python3 python3.12 python3.13}"
    "$(find_python)" tools/constraints.py oldest >"$CONSTRAINTS" || fail "the lower bounds of setup.cfg cannot be read"
    prepare_environment dev
}

# An environment of its own in .venv-NAME, for packages that do not go together with the project's, or to go without these. Made
# once, and again where what it is to hold changes.
#
#   prepare_apart NAME with PACKAGE...       sees the packages of .venv, which its own cover
#   prepare_apart NAME without PACKAGE...    sees its own alone
#
# Where it cannot be made: a line, and the tests that need it are skipped.
prepare_apart() {
    local name="$1" base="$2" folder=".venv-$1" wanted
    shift 2
    wanted="$base $*"
    [ "$base" = without ] || wanted="$wanted $(cat .venv/installed-dev)" # of setup.cfg, which says what ours are
    [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ] || return 0
    echo "Installing $* into $folder (the first time: some minutes)"
    if .venv/bin/python -m venv --clear "$folder" &&
        { [ "$base" = without ] || show_packages_to "$folder"; } &&
        "$folder/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; then
        echo "$wanted" >"$folder/installed"
    else
        echo "$folder could not be made (see above); tests that need it are skipped" >&2
    fi
}

show_packages_to() {
    local ours theirs
    ours="$(.venv/bin/python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")')" &&
        theirs="$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" &&
        echo "$ours" >"$theirs/ours.pth"
}
