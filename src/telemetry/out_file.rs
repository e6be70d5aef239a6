//! Files that people name for results.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A file that takes its place only when it is whole: what stood there outlives a run that fails, and a place that cannot
/// be written is found before the work.
#[derive(Debug)]
pub struct OutFile {
    file: File,
    /// Where it lies until then, and its place; `None` for what is no file, like `/dev/stdout`.
    place: Option<(PathBuf, PathBuf)>,
}

impl OutFile {
    /// Begins a file beside its place.
    pub fn create(path: &Path) -> io::Result<Self> {
        // Of a link, what it leads to is replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        match fs::metadata(&path) {
            Ok(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(there) if !there.is_file() => return Ok(Self { file: File::create(&path)?, place: None }),
            // One that must not be written must not be replaced either.
            Ok(_) => drop(OpenOptions::new().append(true).open(&path)?),
            Err(_) => {}
        }
        let mut part = path.clone().into_os_string();
        part.push(format!(".{}.part", std::process::id()));
        // In a container a run has the same number every time: what one left that was killed is in the way.
        match fs::remove_file(&part) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = File::create_new(&part)?;
        Ok(Self { file, place: Some((part.into(), path)) })
    }

    /// To write with; it may be closed at any time before [`Self::finish`].
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Puts the file into its place.
    pub fn finish(mut self) -> io::Result<()> {
        if let Some((part, path)) = &self.place {
            // A file that is mounted by itself cannot be replaced, but it can be written.
            fs::rename(part, path).or_else(|_| fs::copy(part, path).and_then(|_| fs::remove_file(part)))?;
        }
        self.place = None;
        Ok(())
    }

    /// The same, with `text` as the last of it.
    pub fn finish_with(mut self, text: &str) -> io::Result<()> {
        self.file.write_all(text.as_bytes())?;
        self.finish()
    }
}

impl Drop for OutFile {
    fn drop(&mut self) {
        if let Some((part, _)) = &self.place {
            let _ = fs::remove_file(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_when_the_new_one_is_whole_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let [path, link] = ["result", "link"].map(|name| dir.path().join(name));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        fs::write(&path, "old").unwrap();
        let out = OutFile::create(&link).unwrap();
        out.writer().unwrap().write_all(b"half").unwrap();
        drop(out);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let out = OutFile::create(&link).unwrap();
        out.writer().unwrap().write_all(b"whole ").unwrap();
        out.finish_with("file").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole file");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no part stays");
        // A run that was killed left one.
        fs::write(dir.path().join(format!("result.{}.part", std::process::id())), "half").unwrap();
        OutFile::create(&path).unwrap().finish_with("again").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "again");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_found_at_once_and_a_device_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(OutFile::create(dir.path()).unwrap_err().kind(), io::ErrorKind::IsADirectory);
        assert_eq!(OutFile::create(&dir.path().join("absent/file")).unwrap_err().kind(), io::ErrorKind::NotFound);
        OutFile::create(Path::new("/dev/null")).unwrap().finish_with("text").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
