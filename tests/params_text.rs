//! The README table and the default YAML are what the parameter table prints. `UPDATE_GENERATED=1` writes them anew.

use std::path::Path;

use pi0_mps::params::{TABLE, default_yaml, help_table, markdown_table};

fn updating() -> bool {
    std::env::var_os("UPDATE_GENERATED").is_some()
}

#[test]
fn the_default_yaml_is_what_the_table_prints() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/defaults.yaml");
    if updating() {
        std::fs::write(&path, default_yaml()).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap();
    assert_eq!(found, default_yaml(), "run UPDATE_GENERATED=1 cargo test --test params_text");
}

#[test]
fn the_readme_table_is_what_the_table_prints() {
    const MARKERS: [&str; 2] = ["<!-- parameters -->\n", "<!-- /parameters -->"];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let Ok(readme) = std::fs::read_to_string(&path) else {
        eprintln!("no README.md yet");
        return;
    };
    let Some((before, rest)) = readme.split_once(MARKERS[0]) else {
        eprintln!("README.md has no parameter markers yet");
        return;
    };
    let (found, after) = rest.split_once(MARKERS[1]).expect("README.md has the first marker, not the second");
    if updating() {
        std::fs::write(&path, [before, MARKERS[0], &markdown_table(), MARKERS[1], after].concat()).unwrap();
        return;
    }
    assert_eq!(found, markdown_table(), "run UPDATE_GENERATED=1 cargo test --test params_text");
}

#[test]
fn every_parameter_stands_in_every_text() {
    for s in TABLE {
        assert!(markdown_table().contains(&format!("| `{}` |", s.name)), "{}", s.name);
        assert!(default_yaml().contains(&format!("{}:", s.name)), "{}", s.name);
        assert!(help_table().contains(s.about), "{}", s.name);
    }
    let columns = |line: &str| line.matches('|').count();
    assert!(markdown_table().lines().all(|l| columns(l) == 7), "a cell holds a bar");
}
