//! Makes include/rsbucket.h from src/ffi, so that the header has one source, next to the code.
//!
//! cbindgen alone puts all constants of a crate first, then all types, then all functions. A manual
//! needs the order in which it is explained, so each file of src/ffi is one section, cut into
//! pieces, and cbindgen sees one piece at a time. What cuts a section, in the Rust source:
//!
//! - `//! # Title` begins the section's banner; the `//!` lines after it are its text.
//! - `// ## Title` begins a smaller banner; the `//` lines after it are its text.
//! - `// C: text` is a line of C as it stands, for what has no form in Rust (initializers).

use std::fmt::Write;
use std::fs;
use std::path::Path;

/// The sections, in the order of the header; each is a file of src/ffi.
const SECTIONS: [&str; 6] = ["version", "status", "dtype", "comm", "bucketer", "log"];

/// No line of the header is longer.
pub const WIDTH: usize = 100;

/// The right-most column in which the text beside a table of constants may begin.
const TABLE: usize = 50;

const OPEN: &str = "
#ifndef RSBUCKET_H
#define RSBUCKET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern \"C\" {
#endif
";

const CLOSE: &str = "
#ifdef __cplusplus
}
#endif

#endif /* RSBUCKET_H */
";

/// The header's text, from the crate at `root`; `scratch` is a folder for cbindgen's input.
pub fn header(root: &Path, scratch: &Path) -> String {
    let mut config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("config");
    let page = config
        .header
        .take()
        .expect("cbindgen.toml has the opening page");
    let mut out = page.trim_end().to_string() + "\n" + OPEN;
    for name in SECTIONS {
        let source = fs::read_to_string(root.join(format!("src/ffi/{name}.rs"))).expect(name);
        for (i, piece) in pieces(&source).iter().enumerate() {
            let text = match piece {
                Piece::C(text) => text.clone(),
                Piece::Rust(code) => {
                    let file = scratch.join(format!("{name}_{i}.rs"));
                    fs::write(&file, code).expect("scratch file");
                    tidy(&declarations(&config, &file))
                }
            };
            if !text.is_empty() {
                out = out + "\n" + &text;
            }
        }
    }
    out + CLOSE
}

/// A part of a section.
enum Piece {
    /// Text of the header.
    C(String),
    /// Rust for cbindgen.
    Rust(String),
}

/// Cuts a file of src/ffi.
fn pieces(source: &str) -> Vec<Piece> {
    type Set = fn(&[&str]) -> String;
    let marks: [(&str, &str, Set); 3] = [
        ("//! # ", "//! ", section_banner),
        ("// ## ", "// ", banner),
        ("// C: ", "// C: ", |lines| lines.join("\n") + "\n"),
    ];
    let mut lines = source
        .lines()
        .skip_while(|line| !line.starts_with(marks[0].0))
        .peekable();
    let mut all = Vec::new();
    let mut rust = String::new();
    while let Some(line) = lines.next() {
        let Some((first, more, set)) = marks.iter().find(|(first, ..)| line.starts_with(first))
        else {
            rust = rust + line + "\n";
            continue;
        };
        all.push(Piece::Rust(std::mem::take(&mut rust)));
        let mut text = vec![&line[first.len()..]];
        let goes_on = |line: &&str| line.starts_with(more) || *line == more.trim_end();
        while let Some(line) = lines.next_if(goes_on) {
            text.push(line.strip_prefix(more).unwrap_or_default());
        }
        all.push(Piece::C(set(&text)));
    }
    all.push(Piece::Rust(rust));
    all
}

/// A section's title, across the page, and its text.
fn section_banner(lines: &[&str]) -> String {
    let rule = "=".repeat(WIDTH - 3);
    format!(
        "/* {rule}\n * {}\n * {rule}{}",
        lines[0],
        comment_rest(&lines[1..])
    )
}

/// A smaller title and its text.
fn banner(lines: &[&str]) -> String {
    let title = format!("/* ---- {} ", lines[0]);
    let width = if lines.len() == 1 { WIDTH - 3 } else { WIDTH };
    format!("{title:-<width$}{}", comment_rest(&lines[1..]))
}

/// The rest of a comment.
fn comment_rest(lines: &[&str]) -> String {
    if lines.is_empty() {
        return " */\n".to_string();
    }
    let text: String = lines
        .iter()
        .map(|line| format!("\n * {line}").trim_end().to_string())
        .collect();
    text + "\n */\n"
}

/// What cbindgen makes of a piece; nothing if it declares nothing.
fn declarations(config: &cbindgen::Config, file: &Path) -> String {
    let bindings = cbindgen::Builder::new()
        .with_config(config.clone())
        .with_src(file)
        .generate()
        .unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let mut out = Vec::new();
    bindings.write(&mut out);
    String::from_utf8(out).expect("UTF-8")
}

/// Sets cbindgen's output: short comments on one line, constants in tables, no tag where the type's
/// name is enough, 64-bit constants by their C99 macro (`ull` is another type than uint64_t where
/// that is unsigned long).
fn tidy(c: &str) -> String {
    let mut out = String::new();
    let mut constants = Vec::new();
    let mut lines = c.lines();
    while let Some(line) = lines.next() {
        let mut comment = Vec::new();
        let mut item = line.to_string();
        if line.trim_start() == "/**" {
            comment = lines
                .by_ref()
                .map(|line| line.trim_start().trim_start_matches('*').to_string())
                .take_while(|text| text != "/")
                .collect();
            item = lines
                .next()
                .expect("a comment stands before an item")
                .to_string();
        }
        if !item.starts_with("typedef struct ") {
            item = item
                .replace("struct rsb_", "rsb_")
                .replace("(void*)", "(void *)");
        }
        if let Some(define) = item.strip_prefix("#define ") {
            let (name, value) = define.split_once(' ').expect("a value");
            let value = value.replace("1ull", "UINT64_C(1)");
            constants.push((name.to_string(), value, comment));
        } else if !item.is_empty() || constants.is_empty() {
            flush_constants(&mut constants, &mut out);
            push_item(&item, &comment, &mut out);
        }
    }
    flush_constants(&mut constants, &mut out);
    let text = out.trim();
    if text.is_empty() {
        return String::new();
    }
    text.to_string() + "\n"
}

/// An item under its comment. A field's comment ends on its last line, if there is room.
fn push_item(item: &str, comment: &[String], out: &mut String) {
    let indent = &item[..item.len() - item.trim_start().len()];
    match comment {
        [] => {}
        [line] if indent.len() + line.len() + "/** */".len() <= WIDTH => {
            writeln!(out, "{indent}/**{line} */").unwrap();
        }
        lines => {
            let mut text = format!("{indent}/**{}", lines.join(&format!("\n{indent} *")));
            let last = text.lines().last().map_or(0, str::len);
            let inside = !indent.is_empty() && last + " */".len() <= WIDTH;
            text += &if inside {
                " */".to_string()
            } else {
                format!("\n{indent} */")
            };
            writeln!(out, "{text}").unwrap();
        }
    }
    writeln!(out, "{item}").unwrap();
}

/// A run of constants: a table, or, where the names leave no room beside them, each under its
/// comment.
fn flush_constants(run: &mut Vec<(String, String, Vec<String>)>, out: &mut String) {
    if run.is_empty() {
        return;
    }
    let name_width = run.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    let value_width = run
        .iter()
        .map(|(_, value, _)| value.len())
        .max()
        .unwrap_or(0);
    let column = "#define ".len() + name_width + 1 + value_width + 2;
    let constants = std::mem::take(run);
    for (name, value, comment) in constants {
        if column > TABLE {
            push_item(&format!("#define {name} {value}"), &comment, out);
            continue;
        }
        let define = format!("#define {name:name_width$} {value:>value_width$}  /**<");
        let comment = comment.join(" ") + " */";
        let mut words = comment.split_whitespace().peekable();
        let mut line = define;
        while let Some(word) = words.next() {
            let end = words.next_if_eq(&"*/").map_or(0, |end| 1 + end.len());
            if line.len() + 1 + word.len() + end > WIDTH {
                writeln!(out, "{line}").unwrap();
                line = " ".repeat(column + "/**<".len());
            }
            line = line + " " + word + if end > 0 { " */" } else { "" };
        }
        writeln!(out, "{line}").unwrap();
    }
    writeln!(out).unwrap();
}
