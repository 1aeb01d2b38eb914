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

/// What an object of ours can't be without: `.BTF.ext` names the functions, `maps` and `license` are aya's.
const NEEDED: [&str; 4] = [".BTF", ".BTF.ext", "license", "maps"];

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
