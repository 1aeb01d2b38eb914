//! The table of refused connection attempts from an address to itself, counted by network namespace, address
//! and port.

use aya_ebpf::{
    EbpfContext, Global,
    bindings::BPF_F_MMAPABLE,
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{Array, HashMap},
};
use aya_log_ebpf::warn;
use selfconn_ebpf::{
    Endpoint, Opener, Owner, PORT_SLOTS, counter, port_slot,
    refused_connects::{EVERYBODY, RefusedConnectsReport, RefusedCount, UsedEntries},
    tag,
};

use super::{
    counters::{add_one, count},
    kernel_read::KernelRead,
    owners, ring_buffer,
    sock::Sock,
};

/// A plain hash, not an LRU: user space removes an entry after a minute without attempts, and attempts that
/// do not fit are counted. The loader may set its size.
#[map]
static REFUSED_CONNECTS: HashMap<Endpoint, RefusedCount> = HashMap::with_max_entries(4_096, 0);

/// Maximum number of entries of [`REFUSED_CONNECTS`]. The loader sets it together with the size of the map.
#[unsafe(no_mangle)]
static REFUSED_SIZE: Global<u32> = Global::new(4_096);

/// When a connect was last refused at a port. User space reads it through mmap(2), and asks for an entry of
/// [`REFUSED_CONNECTS`] only where there may be one.
#[map]
static REFUSED_AT: Array<u64> = Array::with_max_entries(PORT_SLOTS, BPF_F_MMAPABLE);

/// The number of entries of each payer. A plain hash, because an LRU would forget the count of one who has entries. It
/// has room for all: each entry has three payers beside [`EVERYBODY`]. The loader sets its size together with that of
/// [`REFUSED_CONNECTS`].
#[map]
static REFUSED_SHARES: HashMap<Owner, u64> = HashMap::with_max_entries(3 * 4_096 + 1, 0);

/// The initial value of a share. A static has an address of its own; a reference to a constant may be merged with a
/// global of the same value, and then the loader sets both.
static NO_ENTRIES: u64 = 0;

/// The initial value of an entry. It is in `.rodata`, because it would not fit on the stack.
static ZERO: RefusedCount = RefusedCount::ZERO;

/// Counts one refused attempt, and reports its destination to user space if a report is due.
#[inline(always)]
pub(crate) fn count_refused<C: EbpfContext, M: KernelRead>(
    ctx: &C,
    sock: Sock<M>,
    endpoint: &Endpoint,
    opener: &Opener,
) {
    count(counter::REFUSED);
    let destination = endpoint.any_family();
    let entry = REFUSED_CONNECTS.get_ptr_mut(&destination).or_else(|| {
        /// Do not overwrite an entry that another CPU has just inserted: `include/uapi/linux/bpf.h`.
        const BPF_NOEXIST: u64 = 1;
        if !has_room(&opener.owner) {
            return None;
        }
        let is_new = REFUSED_CONNECTS.insert(&destination, &ZERO, BPF_NOEXIST).is_ok();
        let entry = REFUSED_CONNECTS.get_ptr_mut(&destination);
        if let Some(entry) = entry
            && is_new
        {
            // SAFETY: the pointer is to a value of the map. No other CPU writes to this field.
            unsafe { (*entry).owner = opener.owner };
            charge(&opener.owner);
        }
        entry
    });
    let Some(refused) = entry else {
        count(counter::REFUSED_TABLE_FULL);
        // SAFETY: the pointer is to a value of the map.
        owners::count_loss(&opener.owner, |state| unsafe { &raw mut (*state).lost_refused_connects });
        warn!(ctx, "the refused connect table is full: one to port {} is not counted", destination.port);
        return;
    };
    // SAFETY: the pointer is to a value of the map. Its memory belongs to the map even if user space removes
    // the entry at the same time.
    unsafe { add_one(&raw mut (*refused).total) };
    // SAFETY: as above. The documentation of `RefusedCount` says which writes of another CPU can collide.
    let refused = unsafe { &mut *refused };
    // SAFETY: the helper takes no arguments.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    if let Some(at) = REFUSED_AT.get_ptr_mut(port_slot(&destination)) {
        // SAFETY: a slot of an array stays valid as long as the program is loaded. It is written whole.
        unsafe { at.write_volatile(now_ns) };
    }
    // The read is volatile, because the compiler does not know that the inline assembly has changed `total`.
    // SAFETY: the pointer comes from a live reference.
    let total = unsafe { core::ptr::read_volatile(&raw const refused.total) };
    refused.set_range(sock.own_port_range(), now_ns);
    if refused.record(total, now_ns, opener) {
        let report =
            || RefusedConnectsReport { tag: tag::REFUSED_CONNECTS, padding: 0, more_padding: 0, destination };
        if ring_buffer::submit(report) {
            refused.mark_reported();
        } else {
            refused.postpone_report(now_ns);
        }
    }
}

/// True if the table has room for one more entry of this owner. Nothing is charged yet, so a refused one costs nobody.
#[inline(always)]
fn has_room(owner: &Owner) -> bool {
    let used = UsedEntries {
        owner: used(owner),
        user: owner.everywhere().map_or(0, |user| used(&user)),
        cgroup: used(&owner.everybody()),
        everybody: used(&EVERYBODY),
    };
    used.leave_room(REFUSED_SIZE.load())
}

#[inline(always)]
fn used(party: &Owner) -> u64 {
    // SAFETY: the pointer is to a value of the map.
    REFUSED_SHARES.get_ptr(party).map_or(0, |used| unsafe { used.read_volatile() })
}

/// Charges a new entry to all who pay for it.
#[inline(always)]
fn charge(owner: &Owner) {
    add_entry(owner);
    if let Some(user) = owner.everywhere() {
        add_entry(&user);
    }
    add_entry(&owner.everybody());
    add_entry(&EVERYBODY);
}

#[inline(always)]
fn add_entry(party: &Owner) {
    const BPF_NOEXIST: u64 = 1;
    let used = REFUSED_SHARES.get_ptr_mut(party).or_else(|| {
        let _ = REFUSED_SHARES.insert(party, &NO_ENTRIES, BPF_NOEXIST);
        REFUSED_SHARES.get_ptr_mut(party)
    });
    if let Some(used) = used {
        // SAFETY: the pointer is to a value of the map; it is aligned.
        unsafe { add_one(used) };
    }
}
