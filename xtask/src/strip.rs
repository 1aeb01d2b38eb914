//! Removes DWARF from an eBPF object.
//!
//! bpf-linker makes BTF from DWARF. After that, DWARF is 90 % of the file, and nobody reads it.

use anyhow::{Context as _, Result, ensure};
use object::{
    Object as _,
    build::elf::{Builder, SectionData},
    elf,
    read::elf::ElfFile64,
};

/// Sections that must be in the result: `.BTF.ext` names the functions, and the kernel reads `license`.
const NEEDED: [&str; 3] = [".BTF", ".BTF.ext", "license"];

/// The object without its DWARF.
pub(crate) fn without_dwarf(raw: &[u8]) -> Result<Vec<u8>> {
    let mut object = Builder::read(raw).context("read the linked object")?;
    for section in &mut object.sections {
        section.delete = is_removed(&section.name);
    }
    object.delete_orphan_symbols();
    // LLVM has the names of sections and symbols in one table, and the writer needs two.
    if !object.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = object.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    object.write(&mut stripped).context("write the object without DWARF")?;
    let object: ElfFile64<'_> = ElfFile64::parse(&*stripped).context("read the object without DWARF")?;
    for name in NEEDED {
        ensure!(object.section_by_name(name).is_some(), "the linked object has no section {name}");
    }
    Ok(stripped)
}

/// True for DWARF, and for the relocations of `.BTF.ext`: they are a quarter of the rest, and a loader finds
/// functions by name.
fn is_removed(section: &[u8]) -> bool {
    section.starts_with(b".debug_") || section.starts_with(b".rel.debug_") || section == b".rel.BTF.ext"
}

#[cfg(test)]
mod tests {
    use object::{
        Architecture, BinaryFormat, Endianness, ObjectSection as _, ObjectSymbol as _, RelocationFlags,
        RelocationTarget, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
        write::{Object, Relocation, Symbol, SymbolSection},
    };

    use super::*;

    /// A small object like bpf-linker's: a program that refers to a map, its BTF, and DWARF that refers to
    /// DWARF.
    fn linked(sections: &[&str]) -> Vec<u8> {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        let mut add = |name: &str, kind, data: &[u8]| {
            let id = object.add_section(Vec::new(), name.into(), kind);
            object.append_section_data(id, data, 8);
            id
        };
        let program = add("tp_btf/inet_sock_set_state", SectionKind::Text, &[0x18; 16]);
        let info = add(".debug_info", SectionKind::Debug, &[1; 64]);
        let strings = add(".debug_str", SectionKind::Debug, b"name\0");
        let needed: Vec<_> =
            sections.iter().map(|name| add(name, SectionKind::Data, name.as_bytes())).collect();

        let map = object.add_symbol(Symbol {
            name: b"RECORDS".to_vec(),
            value: 4,
            size: 4,
            kind: SymbolKind::Data,
            scope: SymbolScope::Dynamic,
            weak: false,
            section: SymbolSection::Section(needed[needed.len() - 1]),
            flags: SymbolFlags::None,
        });
        let strings = object.section_symbol(strings);
        for (section, symbol, offset) in [(info, strings, 8), (program, map, 0)] {
            let flags = RelocationFlags::Elf { r_type: elf::R_BPF_64_64 };
            object
                .add_relocation(section, Relocation { offset, symbol, addend: 0, flags })
                .expect("a relocation");
        }
        object.write().expect("an object")
    }

    #[test]
    fn only_dwarf_is_removed() {
        let raw = linked(&NEEDED);
        let stripped = without_dwarf(&raw).expect("an object");
        let object: ElfFile64<'_> = ElfFile64::parse(&*stripped).expect("an object");
        let names: Vec<_> = object.sections().filter_map(|section| section.name().ok()).collect();
        assert!(!names.iter().any(|name| name.contains("debug")), "{names:?}");
        assert!(stripped.len() < raw.len());

        let program = object.section_by_name("tp_btf/inet_sock_set_state").expect("the program");
        let (offset, relocation) = program.relocations().next().expect("its relocation");
        let RelocationTarget::Symbol(index) = relocation.target() else { panic!("no symbol") };
        let symbol = object.symbol_by_index(index).expect("a symbol");
        assert_eq!((offset, symbol.name(), symbol.address()), (0, Ok("RECORDS"), 4));
        assert_eq!(without_dwarf(&stripped).expect("an object"), stripped, "nothing more to remove");
    }

    #[test]
    fn an_object_without_btf_is_refused() {
        let error = without_dwarf(&linked(&["license", "maps"])).expect_err("no BTF");
        assert_eq!(error.to_string(), "the linked object has no section .BTF");
    }

    #[test]
    fn other_files_are_refused() {
        without_dwarf(b"not an object").expect_err("no object");
    }
}
