//! What can be wrong with a GPU, decided from values alone: each an error that says what to do.

use cudarc::driver::sys::{self, CUresult};

use super::device::Capability;
use super::plan::PORTABLE_SHARED;
use crate::engine::EngineError;

/// Oldest driver that runs what CUDA 13.0 compiles.
const MIN_DRIVER: i32 = 13000;
/// Oldest chip there are kernels for.
const MIN_CAPABILITY: Capability = (8, 0);
/// Shared memory a block may ask for, as the largest portable kernels need it.
const MIN_SHARED: u32 = PORTABLE_SHARED as u32;

/// The error for GPU `ordinal`, which cannot be used.
pub(super) fn unavailable(ordinal: usize, reason: impl Into<String>, remedy: impl Into<String>) -> EngineError {
    EngineError::Unavailable { device: format!("cuda:{ordinal}"), reason: reason.into(), remedy: remedy.into() }
}

/// No driver, or no library of matrix products.
pub(super) fn libraries(ordinal: usize, driver: bool, cublas: bool) -> Result<(), EngineError> {
    if !driver {
        let reason = "the NVIDIA driver (libcuda.so.1) was not found";
        return Err(unavailable(ordinal, reason, "Install it, or use device:=cpu"));
    }
    if !cublas {
        let remedy = "Install CUDA's cuBLAS library, or put its folder into LD_LIBRARY_PATH";
        return Err(unavailable(ordinal, "libcublasLt was not found", remedy));
    }
    Ok(())
}

/// A driver that cannot run the kernels; `version` as the driver tells it, 1000·major + 10·minor of CUDA.
pub(super) fn driver(ordinal: usize, version: i32) -> Result<(), EngineError> {
    if version >= MIN_DRIVER {
        return Ok(());
    }
    let reason = format!("the driver supports CUDA {}.{}, 13.0 is needed", version / 1000, version % 1000 / 10);
    Err(unavailable(ordinal, reason, "Install driver 580 or newer"))
}

/// No GPU of that number.
pub(super) fn number(ordinal: usize, count: i32) -> Result<i32, EngineError> {
    let found = i32::try_from(ordinal).ok().filter(|o| *o < count);
    found.ok_or_else(|| match count {
        0 => unavailable(ordinal, "the driver finds no GPU", "Check nvidia-smi"),
        1 => unavailable(ordinal, "there is one GPU", "Use cuda:0"),
        n => unavailable(ordinal, format!("there are {n} GPUs"), format!("Use cuda:0 to cuda:{}", n - 1)),
    })
}

/// A chip that is too old for the kernels, or gives a block too little shared memory.
pub(super) fn chip(ordinal: usize, name: &str, capability: Capability, shared: u32) -> Result<(), EngineError> {
    let remedy = "Use a GPU of the Ampere generation or newer, or device:=cpu";
    if capability < MIN_CAPABILITY {
        let ((major, minor), (least, point)) = (capability, MIN_CAPABILITY);
        let reason = format!("{name} has compute capability {major}.{minor}, {least}.{point} is needed");
        return Err(unavailable(ordinal, reason, remedy));
    }
    if shared < MIN_SHARED {
        let reason = format!("{name} gives a block {shared} bytes of shared memory, {MIN_SHARED} are needed");
        return Err(unavailable(ordinal, reason, remedy));
    }
    Ok(())
}

/// More memory than there is free.
pub(super) fn room(device: &str, needed: usize, free: usize) -> Result<(), EngineError> {
    if needed <= free {
        return Ok(());
    }
    Err(EngineError::Memory { device: device.into(), needed, free })
}

/// What a failed call of the driver means. Kernels that were not compiled for this chip, or that the driver is too old
/// for, are a matter of the build; everything else is a GPU that is lost to this process.
pub(super) fn call(what: &'static str, code: CUresult, text: &str) -> EngineError {
    let device = || "cuda".to_owned();
    let reason = format!("{what}: {code:?}: {text}");
    match code {
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => EngineError::Unavailable {
            device: device(),
            reason,
            remedy: "Build with PI0_CUDA_ARCHS=all, or name this chip there".into(),
        },
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            EngineError::Unavailable { device: device(), reason, remedy: "Install driver 580 or newer".into() }
        }
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => EngineError::Device {
            what,
            reason: format!("{code:?}: {text}"),
            remedy: "Free GPU memory (nvidia-smi shows who holds it) and restart the process".into(),
        },
        _ => EngineError::Device {
            what,
            reason: format!("{code:?}: {text}"),
            remedy: "The CUDA context cannot be used further: restart the process and report this".into(),
        },
    }
}

/// As [`call`], unless the call succeeded.
pub(super) fn check(code: CUresult, what: &'static str) -> Result<(), EngineError> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: writes one pointer to a static string; the result says whether it did.
    let named = unsafe { sys::cuGetErrorString(code, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    let text = if named {
        // SAFETY: the driver's strings are static and end with a zero.
        unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".into()
    };
    Err(call(what, code, &text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Blame, Fault};

    fn says(e: EngineError, parts: &[&str]) -> EngineError {
        let text = e.to_string();
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
        assert_eq!(e.fault(), Fault::Machine);
        e
    }

    #[test]
    fn a_machine_without_driver_library_or_gpu_is_told_what_to_install() {
        says(libraries(0, false, true).unwrap_err(), &["cuda:0", "libcuda.so.1", "Install it"]);
        says(libraries(0, true, false).unwrap_err(), &["libcublasLt", "LD_LIBRARY_PATH"]);
        libraries(0, true, true).unwrap();
        says(number(0, 0).unwrap_err(), &["no GPU", "nvidia-smi"]);
        says(number(1, 1).unwrap_err(), &["cuda:1", "one GPU", "cuda:0"]);
        says(number(7, 4).unwrap_err(), &["cuda:7", "4 GPUs", "cuda:3"]);
        assert_eq!(number(3, 4).unwrap(), 3);
    }

    #[test]
    fn an_old_driver_and_an_old_chip_are_named_with_what_is_needed() {
        says(driver(0, 12080).unwrap_err(), &["CUDA 12.8", "13.0", "driver 580"]);
        driver(0, 13000).unwrap();
        says(
            chip(0, "Tesla T4", (7, 5), MIN_SHARED).unwrap_err(),
            &["Tesla T4", "7.5", "8.0", "Ampere", "device:=cpu"],
        );
        says(chip(0, "Odd one", (8, 0), 64 * 1024).unwrap_err(), &["Odd one", "65536", "101376"]);
        // What CUDA's tables say that each gives a block.
        let chips = [(8, 0, 163), (8, 6, 99), (8, 7, 163), (8, 9, 99), (9, 0, 227), (10, 0, 227), (12, 0, 99)];
        for (major, minor, shared) in chips {
            chip(0, "GPU", (major, minor), shared * 1024).unwrap();
        }
    }

    #[test]
    fn too_little_memory_says_how_much_is_needed_and_free() {
        let e = says(room("H200", 6_000_000_000, 1_000).unwrap_err(), &["H200", "6000000000", "1000", "nvidia-smi"]);
        assert!(!e.is_fatal());
        room("H200", 1_000, 1_000).unwrap();
    }

    #[test]
    fn a_build_without_this_chip_is_no_lost_gpu_but_a_sticky_error_is() {
        let e = call("loading kernels", CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image");
        assert!(!says(e, &["loading kernels", "PI0_CUDA_ARCHS=all"]).is_fatal());
        let e = call("loading kernels", CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "ptx");
        assert!(!says(e, &["driver 580"]).is_fatal());
        let e = call("waiting for the GPU", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "illegal");
        assert!(says(e, &["waiting for the GPU", "ILLEGAL_ADDRESS", "restart the process"]).is_fatal());
        assert!(call("x", CUresult::CUDA_ERROR_OUT_OF_MEMORY, "out").to_string().contains("nvidia-smi"));
        check(CUresult::CUDA_SUCCESS, "nothing").unwrap();
    }
}
