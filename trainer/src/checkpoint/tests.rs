use super::*;
use proptest::prelude::*;
use serde::Deserialize;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    loss: f64,
}

const CONFIG_TEXT: &str = "[run]\nname = \"x\"\n";

fn state(step: u64) -> State {
    State { step, loss: 1.0 / step as f64 }
}

fn model(step: u64) -> Vec<u8> {
    (0..300u64).map(|index| (index * step % 251) as u8).collect()
}

fn save(store: &CheckpointStore, step: u64) -> PathBuf {
    let model = model(step);
    let streamed = |file: &mut dyn Write| model.chunks(7).try_for_each(|chunk| file.write_all(chunk));
    let parts = vec![Part::new("model.bin", 300, streamed), Part::from_bytes("optimizer.bin", b"moments")];
    store.save(step, CONFIG_TEXT, &state(step), parts).unwrap()
}

fn store_with(steps: &[u64]) -> (tempfile::TempDir, CheckpointStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path().join("checkpoints"));
    steps.iter().for_each(|&step| drop(save(&store, step)));
    (dir, store)
}

fn steps(store: &CheckpointStore) -> Vec<u64> {
    store.list().unwrap().into_iter().map(|(step, _)| step).collect()
}

/// The step that a run would resume from, after checking that its content is what was saved.
fn resumes_from(store: &CheckpointStore) -> (Option<u64>, Vec<Rejected>) {
    let Latest { checkpoint, rejected } = store.latest_valid().unwrap();
    let step = checkpoint.map(|checkpoint| {
        let step = checkpoint.step();
        assert_eq!(checkpoint.read("model.bin").unwrap(), model(step));
        assert_eq!(checkpoint.state::<State>().unwrap(), state(step));
        step
    });
    (step, rejected)
}

fn temporaries(store: &CheckpointStore) -> usize {
    store.names().unwrap().iter().filter(|name| name.contains(".tmp-")).count()
}

const FILES: [&str; 5] = ["model.bin", "optimizer.bin", "state.json", "config.toml", "manifest.json"];

#[test]
fn tensors_are_streamed_as_safetensors_writes_them() {
    let (a, b): (Vec<f32>, Vec<f32>) = ((0..70_000).map(|i| i as f32).collect(), vec![f32::NAN, -0.0]);
    let tensors: [(&str, &[usize], &[f32]); 3] =
        [("b", &[2], &b), ("a", &[7, 10_000], &a), ("empty", &[0, 3], &[])];
    let mut streamed = Vec::new();
    let part =
        Part::tensors("x", tensors.map(|(name, shape, values)| (name.to_owned(), shape, values)).to_vec());
    assert_eq!(part.bytes, 4 * 70_002);
    (part.write)(&mut streamed).unwrap();
    let views = tensors.map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        (name, safetensors::tensor::TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    assert_eq!(streamed, safetensors::serialize(views, None).unwrap());
}

#[test]
fn what_is_saved_is_loaded() {
    let (_dir, store) = store_with(&[1000]);
    let path = store.path_of(1000);
    assert!(path.ends_with("step-00001000"));
    let checkpoint = load(&path).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.path()), (1000, path.as_path()));
    assert_eq!(checkpoint.read("model.bin").unwrap(), model(1000));
    assert_eq!(checkpoint.read("optimizer.bin").unwrap(), b"moments");
    assert_eq!(checkpoint.state::<State>().unwrap(), state(1000));
    assert_eq!(fs::read_to_string(checkpoint.config().unwrap()).unwrap(), CONFIG_TEXT);
    let manifest = checkpoint.manifest();
    let names: Vec<_> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, FILES[..4]);
    assert_eq!(manifest.files[0].bytes, 300);
    assert_eq!(manifest.config_blake3, blake3::hash(CONFIG_TEXT.as_bytes()).to_hex().as_str());
    assert!(matches!(checkpoint.read("other").unwrap_err(), CheckpointError::Missing { .. }));
    assert!(matches!(checkpoint.state::<Vec<u8>>().unwrap_err(), CheckpointError::State { .. }));
}

#[test]
fn steps_are_ordered_by_number_and_other_names_ignored() {
    let (_dir, store) = store_with(&[99_999_999, 3, 100_000_000]);
    for name in ["step-1", "step-0000000x", "step-+0000001", "notes", "step-00000005.tmp-1"] {
        fs::create_dir(store.root.join(name)).unwrap();
    }
    assert_eq!(steps(&store), [3, 99_999_999, 100_000_000]);
    assert_eq!(resumes_from(&store).0, Some(100_000_000));
}

#[test]
fn a_missing_folder_has_no_checkpoints() {
    let (_dir, store) = store_with(&[]);
    let (step, rejected) = resumes_from(&store);
    assert!(step.is_none() && rejected.is_empty());
    assert_eq!(store.remove_leftovers().unwrap(), 0);
    assert!(store.prune(1, None).unwrap().is_empty());
}

#[test]
fn saving_twice_keeps_the_first_and_replaces_a_broken_one() {
    let (_dir, store) = store_with(&[5]);
    let path = store.path_of(5);
    let before = fs::read(path.join("manifest.json")).unwrap();
    let never = Part::new("model.bin", 0, |_| panic!("a valid checkpoint must not be written again"));
    assert_eq!(store.save(5, "other", &state(5), vec![never]).unwrap(), path);
    assert_eq!(fs::read(path.join("manifest.json")).unwrap(), before);
    fs::write(path.join("model.bin"), "broken").unwrap();
    assert!(load(&path).is_err());
    save(&store, 5);
    assert_eq!(resumes_from(&store).0, Some(5));
    assert_eq!(temporaries(&store), 0);
    // Even a file in its place.
    fs::remove_dir_all(&path).unwrap();
    fs::write(&path, "a file").unwrap();
    save(&store, 5);
    assert_eq!(resumes_from(&store).0, Some(5));
}

#[test]
fn an_interruption_at_any_part_leaves_the_one_before() {
    // A panic inside a writer stops the real sequence where a kill would: nothing is cleaned up after it.
    for stop_at in 0..3 {
        let (_dir, store) = store_with(&[10]);
        let part = |index: usize, name: &'static str| {
            Part::new(name, 8, move |file| {
                file.write_all(b"some")?;
                assert_ne!(index, stop_at, "killed");
                file.write_all(b"more")
            })
        };
        let parts = vec![part(0, "a"), part(1, "b"), part(2, "c")];
        let saved = catch_unwind(AssertUnwindSafe(|| store.save(20, CONFIG_TEXT, &state(20), parts)));
        assert!(saved.is_err());
        assert_eq!((steps(&store), temporaries(&store)), (vec![10], 1));
        assert_eq!(resumes_from(&store).0, Some(10));
        assert_eq!(store.remove_leftovers().unwrap(), 1);
        assert_eq!(temporaries(&store), 0);
        save(&store, 20);
        assert_eq!(resumes_from(&store).0, Some(20));
    }
}

#[test]
fn every_prefix_of_the_write_sequence_falls_back() {
    // All states a crash can leave, made by hand: some files whole, one cut, the rest missing; under the temporary name
    // and, as a disk that reorders would have it, under the final one.
    let (_dir, store) = store_with(&[10, 20]);
    let full = store.root.join("full");
    fs::rename(store.path_of(20), &full).unwrap();
    for name in ["step-00000020.tmp-4194304", "step-00000020"] {
        let partial = store.root.join(name);
        for whole in 0..FILES.len() {
            for cut in [0, 1, 5] {
                fs::create_dir(&partial).unwrap();
                for file in &FILES[..whole] {
                    fs::copy(full.join(file), partial.join(file)).unwrap();
                }
                let content = fs::read(full.join(FILES[whole])).unwrap();
                fs::write(partial.join(FILES[whole]), &content[..cut]).unwrap();
                let (step, rejected) = resumes_from(&store);
                assert_eq!(step, Some(10), "{name} {whole} {cut}");
                assert_eq!(rejected.len(), usize::from(!name.contains("tmp")));
                if cut < 5 {
                    fs::remove_dir_all(&partial).unwrap();
                }
            }
            // The next start of the run writes it again.
            store.remove_leftovers().unwrap();
            save(&store, 20);
            assert_eq!((resumes_from(&store).0, temporaries(&store)), (Some(20), 0));
            fs::remove_dir_all(store.path_of(20)).unwrap();
        }
    }
    // Complete but for the rename.
    fs::rename(full, store.root.join("step-00000020.tmp-4194304")).unwrap();
    assert_eq!(resumes_from(&store).0, Some(10));
}

#[test]
fn any_flipped_byte_falls_back_to_the_one_before() {
    let (_dir, store) = store_with(&[10, 20]);
    for name in FILES {
        let path = store.path_of(20).join(name);
        let content = fs::read(&path).unwrap();
        // Every byte of the small files, every eleventh of the weights.
        let stride = if name == "model.bin" { 11 } else { 1 };
        for index in (0..content.len()).step_by(stride) {
            let mut flipped = content.clone();
            flipped[index] ^= 1 << (index % 8);
            fs::write(&path, &flipped).unwrap();
            match load(&store.path_of(20)) {
                Err(error) => assert!(error.to_string().contains(name), "{error}"),
                // White space of the manifest may change into other white space.
                Ok(_) => assert!(name == MANIFEST && content[index].is_ascii_whitespace(), "{name} {index}"),
            }
        }
        let (step, rejected) = resumes_from(&store);
        assert_eq!((step, rejected.len()), (Some(10), 1), "{name}");
        assert_eq!(rejected[0].path, store.path_of(20));
        fs::write(&path, content).unwrap();
        assert_eq!(resumes_from(&store).0, Some(20));
    }
}

#[test]
fn lengthened_truncated_and_missing_files_fall_back() {
    for name in FILES {
        let (_dir, store) = store_with(&[10, 20]);
        let path = store.path_of(20).join(name);
        let content = fs::read(&path).unwrap();
        fs::write(&path, [content.as_slice(), b"x"].concat()).unwrap();
        assert_eq!(resumes_from(&store).0, Some(10), "{name}");
        fs::write(&path, &content[..content.len() - 1]).unwrap();
        assert_eq!(resumes_from(&store).0, Some(10), "{name}");
        fs::remove_file(&path).unwrap();
        let (step, rejected) = resumes_from(&store);
        assert_eq!(step, Some(10), "{name}");
        match &rejected[0].reason {
            CheckpointError::NoManifest { .. } => assert_eq!(name, MANIFEST),
            CheckpointError::Missing { path } => assert!(path.ends_with(name)),
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn with_none_valid_all_are_named() {
    let (_dir, store) = store_with(&[10, 20]);
    for step in [10, 20] {
        fs::remove_file(store.path_of(step).join(MANIFEST)).unwrap();
    }
    let (step, rejected) = resumes_from(&store);
    assert_eq!(step, None);
    let paths: Vec<_> = rejected.into_iter().map(|rejected| rejected.path).collect();
    assert_eq!(paths, [store.path_of(20), store.path_of(10)]);
    assert!(store.prune(1, None).unwrap().is_empty());
    assert_eq!(steps(&store), [10, 20]);
}

/// Puts a manifest made by `change` in the place of the right one, checksum included.
fn tamper(store: &CheckpointStore, change: impl FnOnce(&mut Manifest)) -> CheckpointError {
    let path = store.path_of(20);
    let mut manifest = Manifest::read(&path).unwrap();
    change(&mut manifest);
    fs::write(path.join(MANIFEST), manifest.seal().unwrap()).unwrap();
    assert_eq!(resumes_from(store).0, Some(10));
    load(&path).unwrap_err()
}

#[test]
fn other_formats_are_told_from_damage() {
    let (_dir, store) = store_with(&[10, 20]);
    let error = tamper(&store, |manifest| manifest.format_version = 2);
    assert!(matches!(error, CheckpointError::Format { found: 2, supported: 1, .. }), "{error}");
    let manifest = store.path_of(20).join(MANIFEST);
    fs::write(&manifest, br#"{"format_version": 3, "shape": ["of", "the", "future"]}"#).unwrap();
    let error = load(&store.path_of(20)).unwrap_err();
    assert!(matches!(error, CheckpointError::Format { found: 3, .. }), "{error}");
    fs::write(&manifest, br#"{"format_version": 1, "steps": 4}"#).unwrap();
    let error = load(&store.path_of(20)).unwrap_err();
    assert!(matches!(error, CheckpointError::BadManifest { .. }), "{error}");
    fs::write(&manifest, vec![b' '; 2 << 20]).unwrap();
    let error = load(&store.path_of(20)).unwrap_err();
    assert!(matches!(error, CheckpointError::BadManifest { .. }), "{error}");
}

#[test]
fn a_copy_under_another_step_s_name_is_refused() {
    let (_dir, store) = store_with(&[10, 20]);
    fs::rename(store.path_of(20), store.path_of(30)).unwrap();
    let (step, rejected) = resumes_from(&store);
    assert_eq!((step, rejected.len()), (Some(10), 1));
    assert!(rejected[0].reason.to_string().contains("step 20"), "{}", rejected[0].reason);
    // Under a name of the user's own it is what it says.
    fs::rename(store.path_of(30), store.root.join("kept")).unwrap();
    assert_eq!(load(&store.root.join("kept")).unwrap().step(), 20);
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let long = "x".repeat(300);
    let bad = [
        "../10",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "",
        ".",
        "..",
        ".hidden",
        "nul\0",
        "é",
        &long,
        "Manifest.json",
    ];
    for name in bad {
        let (_dir, store) = store_with(&[10, 20]);
        let error = tamper(&store, |manifest| manifest.files[0].name = name.into());
        assert!(matches!(error, CheckpointError::UnsafeName { .. }), "{name:?}: {error}");
        let parts = vec![Part::from_bytes(name, b"")];
        let error = store.save(30, "", &state(30), parts).unwrap_err();
        assert!(matches!(error, CheckpointError::UnsafeName { .. }), "{name:?}: {error}");
        assert_eq!(temporaries(&store), 0);
    }
    let (_dir, store) = store_with(&[10, 20]);
    let error = tamper(&store, |manifest| manifest.files.push(manifest.files[0].clone()));
    assert!(matches!(error, CheckpointError::BadManifest { .. }), "{error}");
    let twice = vec![Part::from_bytes("a", b""), Part::from_bytes("a", b"")];
    assert!(matches!(store.save(30, "", &state(30), twice).unwrap_err(), CheckpointError::File(_)));
}

#[cfg(unix)]
#[test]
fn links_and_folders_are_no_files() {
    let (_dir, store) = store_with(&[10, 20]);
    let path = store.path_of(20).join("model.bin");
    fs::rename(&path, store.root.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(store.root.join("elsewhere"), &path).unwrap();
    assert!(matches!(load(&store.path_of(20)).unwrap_err(), CheckpointError::Missing { .. }));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(load(&store.path_of(20)).unwrap_err(), CheckpointError::Missing { .. }));
}

#[test]
fn a_file_changed_after_loading_is_noticed_when_read() {
    let (_dir, store) = store_with(&[10]);
    let checkpoint = load(&store.path_of(10)).unwrap();
    fs::write(store.path_of(10).join("model.bin"), vec![0; 300]).unwrap();
    assert!(matches!(checkpoint.read("model.bin").unwrap_err(), CheckpointError::Damaged { .. }));
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_whole() {
    let (_dir, store) = store_with(&[10]);
    let huge = vec![Part::new("model.bin", u64::MAX / 2, |_| panic!("must not start to write"))];
    let error = store.save(20, "", &state(20), huge).unwrap_err();
    let CheckpointError::NoSpace { need, free, .. } = error else { panic!("{error}") };
    assert!(need > u64::MAX / 2 && need > free);
    assert!(error.to_string().contains(&need.to_string()) && error.to_string().contains(&free.to_string()));
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        let full = Part::new("model.bin", 8, move |file| {
            file.write_all(b"some")?;
            Err(kind.into())
        });
        let error = store.save(20, "", &state(20), vec![full]).unwrap_err();
        assert!(matches!(error, CheckpointError::File(FileError::Full { .. })), "{error}");
        assert!(error.to_string().contains("model.bin"), "{error}");
        assert_eq!((resumes_from(&store).0, temporaries(&store)), (Some(10), 0));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_system_s_own_full_disk_is_recognised() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    let error = full.and_then(|mut file| file.write_all(b"x")).unwrap_err();
    assert!(matches!(FileError::new("write", Path::new("x"), error), FileError::Full { .. }));
}

#[test]
fn a_place_that_cannot_be_written_is_a_clear_error() {
    // Permissions do not bind the superuser, so a file stands where a folder should.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let store = CheckpointStore::new(file.join("checkpoints"));
    let error = store.save(1, "", &state(1), Vec::new()).unwrap_err();
    assert!(
        matches!(error, CheckpointError::File(_)) && error.to_string().contains("checkpoints"),
        "{error}"
    );
    assert!(CheckpointStore::new(&file).latest_valid().is_err());
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_leaves_the_last_checkpoint_whole() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, store) = store_with(&[10]);
    let set_mode = |mode| fs::set_permissions(&store.root, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o555);
    let result = store.save(20, "", &state(20), Vec::new());
    set_mode(0o755);
    match result {
        Err(error) => assert!(matches!(error, CheckpointError::File(FileError::Denied { .. })), "{error}"),
        Ok(path) => assert!(load(&path).is_ok(), "the superuser may write anywhere"),
    }
    assert!(load(&store.path_of(10)).is_ok());
    assert_eq!(temporaries(&store), 0);
}

#[test]
fn a_state_that_cannot_be_read_back_is_never_written() {
    let (_dir, store) = store_with(&[10]);
    let nan = State { step: 20, loss: f64::NAN };
    let error = store.save(20, "", &nan, Vec::new()).unwrap_err();
    assert!(matches!(error, CheckpointError::Unwritable(_)), "{error}");
    assert_eq!((steps(&store), temporaries(&store)), (vec![10], 0));
}

#[test]
fn pruning_keeps_the_newest_valid_ones_and_the_best() {
    let all: Vec<u64> = (1..=6).collect();
    let (_dir, store) = store_with(&all);
    assert_eq!(store.prune(3, Some(2)).unwrap(), [3, 1]);
    assert_eq!(steps(&store), [2, 4, 5, 6]);
    assert_eq!(temporaries(&store), 0);
    // A broken one does not count, so that an older one stays in its place.
    fs::write(store.path_of(6).join("model.bin"), "").unwrap();
    assert!(store.prune(3, None).unwrap().is_empty());
    assert_eq!(store.prune(2, None).unwrap(), [2]);
    assert_eq!(store.prune(0, None).unwrap(), [4]);
    assert_eq!(steps(&store), [5, 6]);
    assert_eq!(resumes_from(&store).0, Some(5));
}

#[test]
fn a_half_deleted_checkpoint_is_not_one() {
    let (_dir, store) = store_with(&[10, 20]);
    let doomed = store.temporary(20, "-old");
    fs::rename(store.path_of(20), &doomed).unwrap();
    fs::remove_file(doomed.join("model.bin")).unwrap();
    let (step, rejected) = resumes_from(&store);
    assert!(step == Some(10) && rejected.is_empty());
    fs::write(store.root.join("foreign.tmp-1"), "").unwrap();
    assert_eq!(store.remove_leftovers().unwrap(), 1);
    assert_eq!(temporaries(&store), 1, "what is not ours stays");
}

#[test]
fn no_manifest_makes_loading_panic() {
    let (_dir, store) = store_with(&[10]);
    let manifest = store.path_of(10).join(MANIFEST);
    proptest!(ProptestConfig::with_cases(64), |(text in "[{}\\[\\]a-f_0-9\":,.]{0,80}", version in 0u32..3)| {
        for text in [text.clone(), format!("{{\"format_version\":{version},\"files\":{text}}}")] {
            fs::write(&manifest, text).unwrap();
            prop_assert!(load(&store.path_of(10)).is_err());
        }
    });
}
