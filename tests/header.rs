//! The public header is what src/ffi says, is clean C and C++, and keeps the C contract: the same
//! functions, constants, types and layout, frozen in contract_prototypes.h and contract_layout.c.

#[path = "header/generate.rs"]
mod generate;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];
const C: [&str; 3] = ["c99", "c11", "c17"];
const CXX: [&str; 3] = ["c++11", "c++17", "c++20"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of tests/, or the header.
fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A new folder for one test's files.
fn scratch(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    fs::create_dir_all(&folder).expect("scratch folder");
    folder
}

/// Compiles `source` as `standard`, with `more` arguments, and requires that nothing is said.
fn compile(test: &str, standard: &str, source: &str, more: &[&str]) {
    let (variable, default, extension) = if standard.starts_with("c++") {
        ("CXX", "c++", "cc")
    } else {
        ("CC", "cc", "c")
    };
    let file = scratch(test).join(format!("{standard}.{extension}"));
    fs::write(&file, source).expect("scratch file");
    let compiler = std::env::var(variable).unwrap_or_else(|_| default.to_string());
    let output = Command::new(&compiler)
        .args(WARNINGS)
        .arg(format!("-std={standard}"))
        .args(["-I", root().join("include").to_str().expect("a UTF-8 path")])
        .args(more)
        .arg(&file)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}; these tests need a C and a C++ compiler"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.is_empty(),
        "{compiler} -std={standard} on\n{source}\n{said}"
    );
}

/// `source` without comments and preprocessor lines, with single spaces.
fn bare(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("/*") {
        code.push_str(&rest[..at]);
        rest = &rest[at + rest[at..].find("*/").expect("a comment ends") + 2..];
    }
    code.push_str(rest);
    let mut lines = Vec::new();
    let mut directive = false;
    for line in code.lines() {
        directive |= line.starts_with('#');
        if !directive {
            lines.push(line);
        }
        directive &= line.ends_with('\\');
    }
    lines
        .join(" ")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The function prototypes of a header, each as one line. Function pointers are not among them.
fn prototypes(source: &str) -> BTreeSet<String> {
    bare(source)
        .split(';')
        .filter_map(|statement| {
            let statement = statement.rsplit(['{', '}']).next()?.trim();
            let name = statement.split('(').next()?.rsplit([' ', '*']).next()?;
            let function = name.starts_with("rsb_") && statement.ends_with(')');
            function.then(|| statement.to_string())
        })
        .collect()
}

/// The names that `source` defines as macros.
fn macros(source: &str) -> BTreeSet<&str> {
    source
        .lines()
        .filter_map(|line| line.strip_prefix("#define "))
        .filter_map(|define| define.split_whitespace().next())
        .collect()
}

#[test]
fn committed_header_is_current() {
    let fresh = generate::header(root(), &scratch("generate"));
    let committed = root().join("include/rsbucket.h");
    if std::env::var_os("RSBUCKET_UPDATE_HEADER").is_some() {
        fs::write(&committed, &fresh).expect("include/rsbucket.h");
    }
    let committed = text("include/rsbucket.h");
    let differs = fresh
        .lines()
        .zip(committed.lines())
        .find(|(new, old)| new != old);
    assert!(
        fresh == committed,
        "include/rsbucket.h is not what src/ffi says; run again with RSBUCKET_UPDATE_HEADER=1. \
         First difference (new, committed): {differs:?}"
    );
}

#[test]
fn header_is_well_set() {
    for (i, line) in text("include/rsbucket.h").lines().enumerate() {
        assert!(
            line.chars().count() <= generate::WIDTH,
            "line {}: {line}",
            i + 1
        );
        assert!(
            line.trim_end() == line && line.is_ascii(),
            "line {}: {line:?}",
            i + 1
        );
    }
}

#[test]
fn header_compiles_alone_and_twice() {
    let source = "#include <rsbucket.h>\n#include <rsbucket.h>\n";
    for standard in C {
        compile(
            "alone",
            standard,
            source,
            &["-Wpadded", "-Wstrict-prototypes", "-fsyntax-only"],
        );
    }
    for standard in CXX {
        compile("alone", standard, source, &["-fsyntax-only"]);
    }
}

/// The opening page's example is a program.
#[test]
fn example_compiles() {
    let header = text("include/rsbucket.h");
    let example: String = header
        .lines()
        .skip_while(|line| *line != " *   #include <rsbucket.h>")
        .take_while(|line| *line == " *" || line.starts_with(" *   "))
        .map(|line| line.get(5..).unwrap_or_default().to_string() + "\n")
        .collect();
    assert!(example.contains("int main("), "{example}");
    for standard in C.iter().chain(&CXX) {
        compile("example", standard, &example, &["-fsyntax-only"]);
    }
}

/// The initializers name every field (-Wextra), set struct_size and leave the rest 0.
#[test]
fn initializers_are_complete() {
    let mut source = "#include <rsbucket.h>\n#include <string.h>\n\nint main(void) {\n".to_string();
    for name in ["rsb_comm_config", "rsb_config", "rsb_submit_args"] {
        let init = name.to_uppercase() + "_INIT";
        source += &format!(
            "  {{\n    static const {name} value = {init};\n    {name} rest = {init};\n    \
             static const unsigned char zero[sizeof rest] = {{0}};\n    rest.struct_size = 0;\n    \
             if (value.struct_size != sizeof value || memcmp(&rest, zero, sizeof rest) != 0) \
             return 1;\n  }}\n"
        );
    }
    source += "  return 0;\n}\n";
    for standard in C.iter().chain(&CXX) {
        let program = scratch("init").join(format!("{standard}.out"));
        compile(
            "init",
            standard,
            &source,
            &["-o", program.to_str().expect("a UTF-8 path")],
        );
        let status = Command::new(&program).status().expect("it runs");
        assert!(status.success(), "{standard}\n{source}");
    }
}

/// Every function has the prototype of the contract, word for word, and there are no others.
#[test]
fn functions_are_the_contracts() {
    let contract = text("tests/contract_prototypes.h");
    let (ours, theirs) = (
        prototypes(&text("include/rsbucket.h")),
        prototypes(&contract),
    );
    assert_eq!(ours.len(), FUNCTIONS, "{ours:#?}");
    assert_eq!(ours, theirs);
    let both = format!("#include <rsbucket.h>\nextern \"C\" {{\n{contract}\n}}\n");
    for standard in CXX {
        compile("prototypes", standard, &both, &["-fsyntax-only"]);
    }
    let both = format!("#include <rsbucket.h>\n{contract}\n");
    for standard in C {
        compile("prototypes", standard, &both, &["-fsyntax-only"]);
    }
}

/// How many functions the contract has.
const FUNCTIONS: usize = 31;

/// Every constant, type, size and offset is the contract's, and there are no other constants.
#[test]
fn layout_is_the_contracts() {
    let layout = text("tests/contract_layout.c");
    for standard in ["c11", "c17"] {
        compile(
            "layout",
            standard,
            &layout,
            &[
                concat!("-DCARGO_MAJOR=", env!("CARGO_PKG_VERSION_MAJOR")),
                concat!("-DCARGO_MINOR=", env!("CARGO_PKG_VERSION_MINOR")),
                concat!("-DCARGO_PATCH=", env!("CARGO_PKG_VERSION_PATCH")),
                "-fsyntax-only",
            ],
        );
    }
    let header = text("include/rsbucket.h");
    let checked: BTreeSet<&str> = layout
        .lines()
        .filter_map(|line| line.strip_prefix("CONSTANT(")?.split(',').next())
        .chain([
            "RSBUCKET_H",
            "RSB_COMM_CONFIG_INIT",
            "RSB_CONFIG_INIT",
            "RSB_SUBMIT_ARGS_INIT",
        ])
        .collect();
    assert_eq!(macros(&header), checked);
}
