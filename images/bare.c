// A guest without an operating system, for a KVM that boots no Linux: drives one virtio-blk disk over all its queues,
// rewrites its pages round after round and checks each before. 32-bit code without paging, started by the PVH entry
// of QEMU and cloud-hypervisor. What it says on the first serial port is what `images/init` and the workload say.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum {
    PAGES = 1152, // a multiple of DEPTH times each number of queues
    ROUNDS = 8,
    DEPTH = 32, // requests under way in each queue; three descriptors each
    QUEUES_MAX = 4,
    QUEUE_SIZE_MAX = 1024,
    PAGE_WORDS = 1024,
};

// The ELF note that names the entry (XEN_ELFNOTE_PHYS32_ENTRY), and the entry. The object is a 64-bit one, because
// cloud-hypervisor loads no other.
__asm__(".code32\n"
        ".section .note.Xen, \"a\", @note\n"
        ".long 4, 4, 18\n"
        ".asciz \"Xen\"\n"
        ".long start\n"
        ".text\n"
        ".globl start\n"
        "start: mov $stack_end, %esp\n"
        "cld\n"
        "call run\n"
        ".bss\n"
        ".balign 16\n"
        ".space 16384\n"
        "stack_end:\n"
        ".text\n");

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }

static u8 in8(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u32 in32(u16 port) {
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

// ---- The serial port.

static void say(const char *text) {
    for (; *text; text++) {
        while (!(in8(0x3fd) & 0x20)) {}
        out8(0x3f8, (u8)*text);
    }
}

static void say_number(u32 number) {
    char digits[11];
    char *first = digits + sizeof digits - 1;
    *first = 0;
    do *--first = (char)('0' + number % 10); while (number /= 10);
    say(first);
}

static void say_with(const char *text, u32 number) {
    say(text);
    say_number(number);
}

// The test ends the VM.
static void halt(void) {
    say("\n");
    for (;;) __asm__ volatile("cli; hlt");
}

static void fail(const char *why, u32 number) {
    say_with(why, number);
    halt();
}

// ---- Where an emulator executes each instruction, a page is much faster as one of these.

static void copy(void *to, const void *from, u32 words) {
    __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
}

static void set(void *to, u32 word, u32 words) {
    __asm__ volatile("rep stosl" : "+D"(to), "+c"(words) : "a"(word) : "memory");
}

static int equal(const void *one, const void *other, u32 words) {
    u8 same;
    __asm__ volatile("cmp %%eax, %%eax; repe cmpsl; sete %0"
                     : "=q"(same), "+D"(one), "+S"(other), "+c"(words) : : "memory", "cc");
    return same;
}

// ---- PCI.

static u32 pci_read32(u32 device, u32 at) {
    out32(0xcf8, 0x80000000u | device << 11 | (at & ~3u));
    return in32(0xcfc);
}

static u8 pci_read8(u32 device, u32 at) { return (u8)(pci_read32(device, at) >> 8 * (at & 3)); }

static void pci_write32(u32 device, u32 at, u32 value) {
    out32(0xcf8, 0x80000000u | device << 11 | (at & ~3u));
    out32(0xcfc, value);
}

static u32 find_disk(void) {
    for (u32 device = 0; device < 32; device++) {
        u32 id = pci_read32(device, 0);
        if (id == 0x10421af4 || id == 0x10011af4) return device;
    }
    fail("BALLAST-GUEST FAIL no virtio-blk on bus ", 0);
    return 0;
}

// ---- virtio: names and offsets are those of its specification.

static volatile u8 *common;
static volatile u8 *notify;
static u32 notify_multiplier;

static volatile u16 *common16(u32 at) { return (volatile u16 *)(common + at); }
static volatile u32 *common32(u32 at) { return (volatile u32 *)(common + at); }

enum {
    FEATURE_SELECT = 0, FEATURES = 4, DRIVER_FEATURE_SELECT = 8, DRIVER_FEATURES = 12, NUM_QUEUES = 18, STATUS = 20,
    QUEUE_SELECT = 22, QUEUE_SIZE = 24, QUEUE_ENABLE = 28, QUEUE_NOTIFY_OFF = 30, QUEUE_DESC = 32, QUEUE_DRIVER = 40,
    QUEUE_DEVICE = 48,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { F_MQ = 12 };
enum { NEXT = 1, WRITE = 2 };
enum { LOAD = 0, STORE = 1 };

static void find_registers(u32 device) {
    for (u32 at = pci_read8(device, 0x34); at; at = pci_read8(device, at + 1)) {
        u32 kind = pci_read8(device, at + 3);
        if (pci_read8(device, at) != 9 || (kind != 1 && kind != 2)) continue;
        u32 bar_at = 0x10 + 4u * pci_read8(device, at + 4);
        u32 bar = pci_read32(device, bar_at);
        if ((bar & 6) == 4 && pci_read32(device, bar_at + 4))
            fail("BALLAST-GUEST FAIL out of 32 bits' reach is the BAR at ", bar_at);
        volatile u8 *registers = (volatile u8 *)((bar & ~15u) + pci_read32(device, at + 8));
        if (kind == 1) common = registers;
        else notify = registers, notify_multiplier = pci_read32(device, at + 16);
    }
    if (!common || !notify) fail("BALLAST-GUEST FAIL no modern virtio registers at PCI device ", device);
    // Memory and bus mastering on.
    pci_write32(device, 4, (pci_read32(device, 4) & 0xffff) | 6);
}

struct descriptor { u64 address; u32 bytes; u16 flags, next; };
struct header { u32 type, reserved; u64 sector; };

static struct queue {
    struct descriptor descriptors[QUEUE_SIZE_MAX];
    struct { u16 flags, index, ring[QUEUE_SIZE_MAX + 1]; } available __attribute__((aligned(4)));
    struct { u16 flags, index; struct { u32 id, bytes; } ring[QUEUE_SIZE_MAX]; } used __attribute__((aligned(4)));
    u32 pages[DEPTH][PAGE_WORDS] __attribute__((aligned(4096)));
    struct header headers[DEPTH];
    u8 statuses[DEPTH];
    u16 size;
    volatile u16 *notify;
} queues[QUEUES_MAX] __attribute__((aligned(4096)));
static u32 queue_count;

static void set_up_queue(u16 n) {
    struct queue *queue = &queues[n];
    *common16(QUEUE_SELECT) = n;
    // As many places as the device offers.
    queue->size = *common16(QUEUE_SIZE);
    if (queue->size < 3 * DEPTH || queue->size > QUEUE_SIZE_MAX)
        fail("BALLAST-GUEST FAIL a queue's size is ", queue->size);
    *common32(QUEUE_DESC) = (u32)queue->descriptors, *common32(QUEUE_DESC + 4) = 0;
    *common32(QUEUE_DRIVER) = (u32)&queue->available, *common32(QUEUE_DRIVER + 4) = 0;
    *common32(QUEUE_DEVICE) = (u32)&queue->used, *common32(QUEUE_DEVICE + 4) = 0;
    queue->notify = (volatile u16 *)(notify + *common16(QUEUE_NOTIFY_OFF) * notify_multiplier);
    queue->available.flags = 1; // no interrupts: who has nothing else to do can look
    *common16(QUEUE_ENABLE) = 1;
}

static void start_device(void) {
    common[STATUS] = 0;
    while (common[STATUS]) {}
    common[STATUS] = ACKNOWLEDGE;
    common[STATUS] = ACKNOWLEDGE | DRIVER;
    *common32(FEATURE_SELECT) = 0;
    u32 multiqueue = *common32(FEATURES) & 1u << F_MQ;
    *common32(DRIVER_FEATURE_SELECT) = 0, *common32(DRIVER_FEATURES) = multiqueue;
    *common32(DRIVER_FEATURE_SELECT) = 1, *common32(DRIVER_FEATURES) = 1; // VERSION_1
    common[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    if (!(common[STATUS] & FEATURES_OK)) fail("BALLAST-GUEST FAIL features refused, status ", common[STATUS]);
    queue_count = multiqueue ? *common16(NUM_QUEUES) : 1;
    if (queue_count > QUEUES_MAX) queue_count = QUEUES_MAX;
    for (u16 n = 0; n < queue_count; n++) set_up_queue(n);
    common[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

static void ask(struct queue *queue, u32 slot, u32 type, u32 page) {
    u16 head = (u16)(3 * slot);
    queue->headers[slot] = (struct header){type, 0, (u64)page * 8};
    queue->statuses[slot] = 0xff;
    queue->descriptors[head] = (struct descriptor){(u32)&queue->headers[slot], 16, NEXT, (u16)(head + 1)};
    queue->descriptors[head + 1] =
        (struct descriptor){(u32)queue->pages[slot], 4096, type == LOAD ? NEXT | WRITE : NEXT, (u16)(head + 2)};
    queue->descriptors[head + 2] = (struct descriptor){(u32)&queue->statuses[slot], 1, WRITE, 0};
    queue->available.ring[(queue->available.index + slot) % queue->size] = head;
}

static void publish(struct queue *queue) {
    __sync_synchronize();
    *(volatile u16 *)&queue->available.index += DEPTH;
    __sync_synchronize();
    *queue->notify = (u16)(queue - queues);
}

static void await_answers(struct queue *queue) {
    while (*(volatile u16 *)&queue->used.index != queue->available.index) __asm__ volatile("pause");
    __sync_synchronize();
    for (u32 slot = 0; slot < DEPTH; slot++)
        if (queue->statuses[slot]) fail("BALLAST-GUEST FAIL a request's status is ", queue->statuses[slot]);
}

// Loads or stores the next DEPTH pages of each queue, the queues taking turns.
static void transfer(u32 type, u32 first) {
    for (u32 n = 0; n < queue_count; n++) {
        for (u32 slot = 0; slot < DEPTH; slot++) ask(&queues[n], slot, type, first + slot * queue_count + n);
        publish(&queues[n]);
    }
    for (u32 n = 0; n < queue_count; n++) await_answers(&queues[n]);
}

// ---- The work.

static u32 noise[2 * PAGE_WORDS];

static void make_noise(void) {
    u32 word = 1;
    for (u32 n = 0; n < 2 * PAGE_WORDS; n++) {
        word ^= word << 13, word ^= word >> 17, word ^= word << 5;
        noise[n] = word;
    }
}

// What a page holds in a round: half can be compressed, and no other page or round has the same.
static void fill(u32 *words, u32 page, u32 round) {
    copy(words, noise + (page * 31 + round * 17) % PAGE_WORDS, PAGE_WORDS / 2);
    set(words + PAGE_WORDS / 2, page * 2654435761u + round, PAGE_WORDS / 2);
    words[0] = page, words[1] = round;
}

static void store_all(u32 first, u32 round) {
    for (u32 n = 0; n < DEPTH * queue_count; n++) fill(queues[n % queue_count].pages[n / queue_count], first + n, round);
    transfer(STORE, first);
}

static void load_all(u32 first, u32 round) {
    static u32 expected[PAGE_WORDS];
    for (u32 n = 0; n < queue_count; n++) set(queues[n].pages, 0, DEPTH * PAGE_WORDS);
    transfer(LOAD, first);
    for (u32 n = 0; n < DEPTH * queue_count; n++) {
        fill(expected, first + n, round);
        if (!equal(queues[n % queue_count].pages[n / queue_count], expected, PAGE_WORDS))
            fail("BALLAST-GUEST FAIL wrong is page ", first + n);
    }
}

__attribute__((noreturn, used)) static void run(void) {
    say("BALLAST-GUEST INIT without an operating system\n");
    find_registers(find_disk());
    start_device();
    make_noise();
    u32 step = DEPTH * queue_count;
    // Page 0 is the swap header.
    for (u32 first = 1; first <= PAGES; first += step) store_all(first, 0);
    for (u32 round = 0; round < ROUNDS; round++) {
        say_with("BALLAST-GUEST PROGRESS round ", round + 1), say_with(" of ", ROUNDS), say("\n");
        for (u32 first = 1; first <= PAGES; first += step) load_all(first, round), store_all(first, round + 1);
    }
    say_with("BALLAST-GUEST PASS pages=", PAGES), say_with(" rounds=", ROUNDS), say(" bad=0");
    say_with(" queues=", queue_count), say_with(" places=", queues[0].size);
    halt();
    __builtin_unreachable();
}
