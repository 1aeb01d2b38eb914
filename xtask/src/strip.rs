//! Leaves the DWARF out of the eBPF object, and makes sure that all the kernel and aya need is still there.
//!
//! The compiler has to make DWARF, for bpf-linker turns it into BTF; after that it is 90 % of the file, for nobody.

use anyhow::{Context as _, Result, bail};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, SectionKind,
    build::elf::{Builder, SectionData},
    elf,
    read::elf::{ElfFile64, ElfSection64},
};

/// What an object of ours can't be without: `.BTF.ext` names the functions, `license` is the kernel's.
const NEEDED: [&str; 3] = [".BTF", ".BTF.ext", "license"];

/// The object without its DWARF.
pub(crate) fn dwarf(raw: &[u8]) -> Result<Vec<u8>> {
    let mut object = Builder::read(raw).context("read the linked object")?;
    for section in &mut object.sections {
        section.delete = is_left_out(&section.name);
    }
    object.delete_orphan_symbols();
    // LLVM keeps the names of sections and of symbols in one table; the writer wants two.
    if !object.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = object.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    object.write(&mut stripped).context("write the object without DWARF")?;
    check(raw, &stripped)?;
    Ok(stripped)
}

/// DWARF, and the relocations of `.BTF.ext`: a quarter of what remains, and a loader finds its functions by name.
fn is_left_out(section: &[u8]) -> bool {
    section.starts_with(b".debug_") || section.starts_with(b".rel.debug_") || section == b".rel.BTF.ext"
}

/// Every section that is to stay is in the stripped object, byte for byte and with all its relocations.
fn check(raw: &[u8], stripped: &[u8]) -> Result<()> {
    let raw: ElfFile64<'_> = ElfFile64::parse(raw).context("read the linked object")?;
    let stripped: ElfFile64<'_> = ElfFile64::parse(stripped).context("read the object without DWARF")?;
    for name in NEEDED {
        if stripped.section_by_name(name).is_none() {
            bail!("the linked object has no section {name}: its bpf-linker is not fit for it");
        }
    }
    for section in raw.sections() {
        let name = section.name().context("read a section's name")?;
        // Symbol tables are numbered anew; what refers to them is compared below.
        if is_left_out(name.as_bytes()) || matches!(section.kind(), SectionKind::Metadata) {
            continue;
        }
        let kept = stripped.section_by_name(name).with_context(|| format!("section {name} got lost"))?;
        if kept.data()? != section.data()? {
            bail!("section {name} was changed while DWARF was left out");
        }
        if name != ".BTF.ext" && targets(&stripped, &kept)? != targets(&raw, &section)? {
            bail!("the relocations of section {name} were changed while DWARF was left out");
        }
    }
    Ok(())
}

/// Where a section refers to what: the symbol's name (a section's own, where it has none), type and value.
fn targets(object: &ElfFile64<'_>, section: &ElfSection64<'_, '_>) -> Result<Vec<(u64, u32, String, u64)>> {
    let mut targets = Vec::new();
    for (offset, relocation) in section.relocations() {
        let RelocationTarget::Symbol(index) = relocation.target() else {
            bail!("a relocation refers to no symbol");
        };
        let RelocationFlags::Elf { r_type } = relocation.flags() else {
            bail!("a relocation is not ELF's");
        };
        let symbol = object.symbol_by_index(index).context("find a relocation's symbol")?;
        let name = match (symbol.name()?, symbol.section_index()) {
            ("", Some(section)) => object.section_by_index(section)?.name()?,
            (name, _) => name,
        };
        targets.push((offset, r_type, name.to_owned(), symbol.address()));
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use object::{
        Architecture, BinaryFormat, Endianness, SymbolFlags, SymbolKind, SymbolScope,
        write::{Object, Relocation, Symbol, SymbolSection},
    };

    use super::*;

    /// What bpf-linker writes, in small: a program that refers to a map, its BTF, and DWARF that refers to DWARF.
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
    fn only_dwarf_is_left_out() {
        let raw = linked(&NEEDED);
        let stripped = dwarf(&raw).expect("an object");
        let object: ElfFile64<'_> = ElfFile64::parse(&*stripped).expect("an object");
        let names: Vec<_> = object.sections().filter_map(|section| section.name().ok()).collect();
        assert!(!names.iter().any(|name| name.contains("debug")), "{names:?}");
        assert!(stripped.len() < raw.len());

        let program = object.section_by_name("tp_btf/inet_sock_set_state").expect("the program");
        let relocations = targets(&object, &program).expect("its relocations");
        assert_eq!(relocations, [(0, elf::R_BPF_64_64, "RECORDS".to_owned(), 4)]);
        assert_eq!(dwarf(&stripped).expect("an object"), stripped, "nothing more to leave out");
    }

    #[test]
    fn an_object_without_btf_is_refused() {
        let error = dwarf(&linked(&["license", "maps"])).expect_err("no BTF");
        assert_eq!(
            error.to_string(),
            "the linked object has no section .BTF: its bpf-linker is not fit for it"
        );
    }

    #[test]
    fn what_is_no_object_is_refused() {
        dwarf(b"not an object").expect_err("no object");
    }
}
