//! Compiles `kernels/*.cu` with nvcc and embeds the result; does nothing without the feature `cuda`.
//!
//! `PI0_CUDA_ARCHS` chooses the targets: a comma-separated list such as `90a,89`, or `all`. The default is sm_90a and
//! PTX for everything newer than sm_80. nvcc is looked for in `NVCC`, `CUDA_HOME`, `PATH`, `/usr/local/cuda` and
//! `.local/cuda` (made by `scripts/setup-nvcc`).

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for every chip the engine is meant for.
const ALL: [&str; 7] = ["80", "86", "87", "89", "90a", "100", "120"];
/// Kernels of these files use what only sm_90a has: they are compiled for nothing else, and left out of a build without.
const HOPPER: [&str; 7] =
    ["attention_vision", "attention_wide", "decode_attention", "geglu_wide", "persistent", "skinny", "tower"];
const HOPPER_ARCH: &str = "90a";
/// PTX of this level is embedded too, so that a newer chip can still start.
const PTX: &str = "80";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "PI0_CUDA_ARCHS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let nvcc = find_nvcc(&root)?;
    let chosen = env::var("PI0_CUDA_ARCHS").unwrap_or_else(|_| HOPPER_ARCH.into());
    let chosen = architectures(&chosen)?;

    let mut sources: Vec<_> = std::fs::read_dir(root.join("kernels"))?.collect::<Result<Vec<_>, _>>()?;
    sources.retain(|s| s.path().extension().is_some_and(|e| e == "cu"));
    sources.sort_by_key(std::fs::DirEntry::path);
    let mut table = String::from("pub(super) static IMAGES: &[(&str, &[u8])] = &[\n");
    for source in &sources {
        let path = source.path();
        let name = path.file_stem().and_then(|s| s.to_str()).ok_or("kernels/: a file name that is not UTF-8")?;
        let mut targets: Vec<String> =
            chosen.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")).collect();
        if HOPPER.contains(&name) {
            targets.retain(|t| t.ends_with(HOPPER_ARCH));
        } else {
            targets.push(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
        }
        if targets.is_empty() {
            continue;
        }
        let image = out.join(format!("{name}.fatbin"));
        let done = Command::new(&nvcc)
            .args(["-std=c++17", "-O3", "-fatbin", "--compress-mode=size"])
            .args(&targets)
            .arg("-o")
            .arg(&image)
            .arg(&path)
            .output()
            .map_err(|e| format!("{}: {e}", nvcc.display()))?;
        if !done.status.success() {
            return Err(format!("{} failed:\n{}", path.display(), String::from_utf8_lossy(&done.stderr)).into());
        }
        writeln!(table, "    ({name:?}, include_bytes!({:?})),", image.display().to_string())?;
    }
    table.push_str("];\n");
    std::fs::write(out.join("kernels.rs"), table)?;
    Ok(())
}

/// The architectures that a list names.
fn architectures(list: &str) -> Result<Vec<&str>, Box<dyn Error>> {
    let chosen: Vec<&str> = if list == "all" { ALL.to_vec() } else { list.split(',').map(str::trim).collect() };
    match chosen.iter().find(|a| !ALL.contains(a)) {
        Some(arch) => Err(format!("PI0_CUDA_ARCHS: '{arch}' is not one of {} or 'all'", ALL.join(", ")).into()),
        None => Ok(chosen),
    }
}

fn find_nvcc(root: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let mut tried = Vec::new();
    if let Some(path) = env::var_os("NVCC") {
        tried.push(PathBuf::from(path));
    }
    if let Some(home) = env::var_os("CUDA_HOME") {
        tried.push(Path::new(&home).join("bin/nvcc"));
    }
    if let Some(path) = env::var_os("PATH") {
        tried.extend(env::split_paths(&path).map(|d| d.join("nvcc")));
    }
    tried.push("/usr/local/cuda/bin/nvcc".into());
    tried.push(root.join(".local/cuda/bin/nvcc"));
    tried.into_iter().find(|p| p.is_file()).ok_or_else(|| {
        "no nvcc in NVCC, CUDA_HOME, PATH, /usr/local/cuda or .local/cuda: run scripts/setup-nvcc, \
         or build without the feature 'cuda'"
            .into()
    })
}
