//! What the engine says when the GPU fails it. A binary of its own: one test leaves the process without a usable GPU.
//! Needs a GPU: `scripts/gpu-check`.

#[allow(dead_code)]
#[path = "common/golden.rs"]
mod golden;
#[allow(dead_code)]
#[path = "common/seeded.rs"]
mod seeded;

use std::ffi::CString;
use std::ptr::null_mut;

use cudarc::driver::sys;
use golden::Golden;
use pi0_mps::engine::cuda::{CudaEngine, Gpu, Tuning, probe};
use pi0_mps::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, View};
use pi0_mps::model::{Checkpoint, Family, Frame, Resampler};

/// Enters the GPU's primary context for calls of this test's own.
fn primary_context() {
    let mut context = null_mut();
    // SAFETY: the driver is initialised by `Gpu::open`; out-parameters on this stack.
    unsafe {
        sys::cuDevicePrimaryCtxRetain(&mut context, 0).result().unwrap();
        sys::cuCtxSetCurrent(context).result().unwrap();
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_process_that_sees_no_gpu_says_so() {
    if std::env::var_os("PI0_TEST_PROBE").is_some() {
        println!("probe: {:?}", probe(0).map_err(|e| e.to_string()));
        return;
    }
    let again = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--include-ignored", "--nocapture", "--exact", "a_process_that_sees_no_gpu_says_so"])
        .env("PI0_TEST_PROBE", "1")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(said.contains("the driver finds no GPU. Check nvidia-smi"), "{said}");
    println!("faults: no GPU is told as such");
}

/// In a process of its own: the GPU is lost to it.
#[test]
#[ignore = "needs a GPU"]
fn a_decoder_that_waits_in_vain_says_so() {
    if std::env::var_os("PI0_TEST_STALL").is_some() {
        let engine = CudaEngine::random(&seeded::full_width(Family::Pi0, 1), Resampler::OpenPi, 0, 1).unwrap();
        let engine = engine.tuned(Tuning::default().stall());
        let (mut encoder, mut decoder) = engine.stages().unwrap();
        let mut cache = engine.cache(1, 4).unwrap();
        let view = seeded::normals(1, 3 * 224 * 224);
        let input = EncodeInput { views: &[View::Planes(&view)], tokens: &[1, 2, 3, 4] };
        encoder.encode(&input, &mut cache).unwrap();
        let (state, noise) = (seeded::normals(2, 32), seeded::normals(3, 50 * 32));
        let input = DecodeInput { state: &state, noise: &noise, steps: 2, guidance: None };
        let e = decoder.decode(&cache, &input, &mut vec![0.0; noise.len()]).unwrap_err();
        println!("stall: fatal {}, {e}", e.is_fatal());
        return;
    }
    let again = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--include-ignored", "--nocapture", "--exact", "a_decoder_that_waits_in_vain_says_so"])
        .env("PI0_TEST_STALL", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    let line = said.lines().find_map(|l| l.split_once("stall: ")).map(|(_, l)| l.to_owned()).unwrap_or_default();
    println!("faults: {line}");
    assert!(line.starts_with("fatal true") && line.contains("waited two seconds in vain"), "{said}");
}

#[test]
#[ignore = "needs a GPU"]
fn too_little_memory_is_told_before_anything_is_allocated() {
    let gpu = Gpu::open(0).unwrap();
    primary_context();
    let (free, _) = gpu.memory().unwrap();
    let mut held = 0;
    // SAFETY: out-parameter on this stack; freed below.
    unsafe { sys::cuMemAlloc_v2(&mut held, free - (2 << 30)).result().unwrap() };
    let mut dims = seeded::full_width(Family::Pi0, 18);
    dims.vision.layers = 27;
    let (before, _) = gpu.memory().unwrap();
    let Err(e) = CudaEngine::random(&dims, Resampler::OpenPi, 0, 1) else { panic!("6 GB fit into 2") };
    println!("faults: {e}");
    assert!(matches!(e, EngineError::Memory { needed, free, .. } if needed > 5 << 30 && free <= before), "{e}");
    assert!(!e.is_fatal());
    let (after, _) = gpu.memory().unwrap();
    assert!(after + (64 << 20) >= before, "{before} free before, {after} after");
    // SAFETY: allocated above.
    unsafe { sys::cuMemFree_v2(held).result().unwrap() };
    drop(CudaEngine::random(&seeded::full_width(Family::Pi0, 1), Resampler::OpenPi, 0, 1).unwrap());
}

/// Stores to address 16, which is nobody's.
const ILLEGAL: &str = ".version 7.0
.target sm_80
.address_size 64
.visible .entry illegal() {
    .reg .b64 %at;
    .reg .b32 %v;
    mov.u64 %at, 16;
    mov.u32 %v, 1;
    st.global.u32 [%at], %v;
    ret;
}";

#[test]
#[ignore = "needs a GPU, and leaves the process without one"]
fn zz_a_sticky_error_is_fatal_and_asks_for_a_restart() {
    let case = Golden::read("pi0_tiny");
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let engine = CudaEngine::load(&checkpoint, Resampler::LeRobot, 0).unwrap();
    let (mut encoder, _decoder) = engine.stages().unwrap();
    let mut cache = engine.cache(case.views.len(), case.tokens.len()).unwrap();
    let views: Vec<View<'_>> = case.views.iter().map(|v| View::Planes(v)).collect();
    let input = EncodeInput { views: &views, tokens: &case.tokens };
    encoder.encode(&input, &mut cache).unwrap();
    let memory = engine.frame_memory();
    let frame = |side| Frame::new(side, side, side, "mono8", vec![side as u8; side * side]).unwrap();
    let kept = frame(100).kept_in(memory.as_deref());
    assert!(kept.pixels().held_by::<Vec<u8>>().is_none());
    primary_context();
    let (source, name) = (CString::new(ILLEGAL).unwrap(), CString::new("illegal").unwrap());
    let (mut module, mut function) = (null_mut(), null_mut());
    // SAFETY: text that ends with a zero, out-parameters on this stack; the illegal store is what is wanted.
    unsafe {
        sys::cuModuleLoadData(&mut module, source.as_ptr().cast()).result().unwrap();
        sys::cuModuleGetFunction(&mut function, module, name.as_ptr()).result().unwrap();
        sys::cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, null_mut(), null_mut(), null_mut()).result().unwrap();
        let _ = sys::cuCtxSynchronize();
    }
    for _ in 0..2 {
        let e = encoder.encode(&input, &mut cache).unwrap_err();
        println!("faults: {e}");
        assert!(e.is_fatal() && e.to_string().contains("restart the process"), "{e}");
    }
    // The cameras go on all the same: what is kept stays readable and is lent again, what cannot be goes to the heap.
    assert!(kept == frame(100));
    drop(kept);
    let again = frame(99).kept_in(memory.as_deref());
    assert!(again == frame(99) && again.pixels().held_by::<Vec<u8>>().is_none());
    let large = frame(1000).kept_in(memory.as_deref());
    assert!(large == frame(1000));
    let on_the_heap = large.pixels().held_by::<Vec<u8>>().is_some();
    println!("faults: frames go on without a GPU, new sizes on the heap: {on_the_heap}");
}
